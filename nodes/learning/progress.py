"""Progress and a live preview of the masks on the node."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.utils

from ...em_core.masks.resizing import resize
from ...em_core.method.loop import StepEvent
from ...em_core.method.state import RunState
from ...em_core.pictures import Picture
from ...em_core.settings import EMSettings, JointSettings
from ...em_core.show.drawing import overlay

SECONDS = 0.5
SIDE = 320


@dataclass
class NodeProgress:
    """A listener that advances the node's bar each step and shows the masks at most twice a second.

    Attributes:
        picture: the first example's picture.
        em, joint: the run's settings.
    """

    picture: Picture
    em: EMSettings
    joint: JointSettings
    shown: float = 0.0
    bar: Any = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.em.steps + (self.joint.steps if self.joint.kind != "none" else 0)
        self.bar = comfy.utils.ProgressBar(self.total)

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Show an event, and raise ComfyUI's interrupt if the user asked to stop."""
        if event.phase == "start":
            logging.info("Learning has begun: the first masks are there.")
        done = event.step + (self.em.steps if event.phase == "joint" else 0)
        self.bar.update_absolute(done, self.total, self.preview(state))
        mm.throw_exception_if_processing_interrupted()

    def preview(self, state: RunState) -> tuple | None:
        """Return the first picture under its masks, or None if one was shown just now."""
        now = time.monotonic()
        if now - self.shown < SECONDS:
            return None
        self.shown = now
        labels = state.pictures[0].labels
        height, width = labels.shape[-2:]
        small = resize(self.picture, (height, width), "picture")
        return ("JPEG", overlay(small, labels, max(1, SIDE // max(height, width))), 512)
