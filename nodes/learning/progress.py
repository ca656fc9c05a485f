"""Progress and a live preview of the masks on the node."""

import logging
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch.nn.functional as F

from ...em_core.errors import Notice
from ...em_core.masks.resizing import Size, resize
from ...em_core.method.loop import StepEvent
from ...em_core.method.state import RunState
from ...em_core.pictures import Picture
from ...em_core.settings import EMSettings, JointSettings, VisualSettings
from ...em_core.show.drawing import overlay
from ...em_core.show.words import say_missing

SECONDS = 0.5
SHARE = 0.02  # of a run's time, at most, is spent on drawing
SIDE = 320


@dataclass
class NodeProgress:
    """A listener that advances the node's bar each step, shows the masks at most twice a second and for
    at most a fiftieth of the time, and tells which concepts were not found.

    Attributes:
        picture: the first example's picture.
        em, joint, visual: the run's settings.
        has_em: whether it begins with the EM loop.
    """

    picture: Picture
    em: EMSettings
    joint: JointSettings
    visual: VisualSettings | None = None
    has_em: bool = True
    shown: float = 0.0
    took: float = 0.0
    small: Picture | None = None
    said: str = ""
    bar: Any = field(init=False)

    def __post_init__(self) -> None:
        after = self.joint.steps if self.joint.kind != "none" else 0
        self.before = self.em.steps if self.has_em else 0
        self.total = self.before + (after if self.visual is None else self.visual.steps)
        self.bar = comfy.utils.ProgressBar(self.total)

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Show an event, and raise ComfyUI's interrupt if the user asked to stop."""
        if event.phase == "start":
            logging.info("Learning has begun: the first masks are there.")
        missing = say_missing(event.missing, len(state.pictures))
        if event.masks and missing != self.said:
            self.said = missing
            warnings.warn(missing or "All concepts are found now.", Notice, stacklevel=2)
        done = event.step + (self.before if event.phase in ("joint", "visual") else 0)
        self.bar.update_absolute(done, self.total, self.preview(state))
        mm.throw_exception_if_processing_interrupted()

    def preview(self, state: RunState) -> tuple | None:
        """Return the first picture under its masks, or None if one was shown just now."""
        began = time.monotonic()
        if began - self.shown < max(SECONDS, self.took / SHARE):
            return None
        labels = state.pictures[0].labels
        longer = max(labels.shape[-2:])
        size = drawn_size(labels.shape[-2], labels.shape[-1])
        if self.small is None:
            self.small = resize(self.picture, size, "picture")
        # Shrunk before it leaves the device: a large picture's labels would be most of what is moved.
        shown = F.interpolate(labels[None].float(), size, mode="nearest")[0] > 0.5
        drawn = overlay(self.small, shown.cpu(), max(1, SIDE // longer))
        self.shown = time.monotonic()
        self.took = self.shown - began
        return ("JPEG", drawn, 512)


def drawn_size(height: int, width: int) -> Size:
    """The size at which masks are drawn: their own, or with 320 pixels on the longer side if that
    is less."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
