"""Progress and a live preview of the masks on the node."""

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import comfy.utils

from ...em_core.errors import Notice
from ...em_core.examples import Example, NamedMasks
from ...em_core.method.loop import StepEvent
from ...em_core.method.state import RunState
from ...em_core.prompts import merge_concepts
from ...em_core.settings import EMSettings, JointSettings, VisualSettings
from ...em_core.show.strip import Strip
from ...em_core.show.words import say_missing, say_time

SECONDS = 0.5
SHARE = 0.02  # of a run's time, at most, is spent on drawing
LARGEST = 1024  # pixels on the longer side of what is sent
PHASES = {
    "start": "First masks",
    "em": "Tokens and masks",
    "joint": "Also training",
    "visual": "Visual condition",
}


@dataclass
class NodeProgress:
    """A listener that advances the node's bar each step, shows all pictures under their masks at most twice
    a second and for at most a fiftieth of the time, and tells which concepts were not found, or are doubtful.

    Attributes:
        examples: of the run.
        em, joint, visual: the run's settings.
        has_em: whether it begins with the EM loop.
    """

    examples: Sequence[Example]
    em: EMSettings
    joint: JointSettings
    visual: VisualSettings | None = None
    has_em: bool = True
    shown: float = 0.0
    took: float = 0.0
    strip: Strip | None = None
    said: str = ""
    first: tuple[int, float] | None = None
    bar: Any = field(init=False)

    def __post_init__(self) -> None:
        after = self.joint.steps if self.joint.kind != "none" else 0
        self.before = self.em.steps if self.has_em else 0
        self.total = self.before + (after if self.visual is None else self.visual.steps)
        self.has_masks = self.em.mode != "none"
        self.bar = comfy.utils.ProgressBar(self.total)

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Show an event, and raise ComfyUI's interrupt if the user asked to stop."""
        if event.phase == "start":
            logging.info("Learning has begun: the first masks are there.")
        missing = say_missing(event.missing, len(state.pictures), event.doubtful)
        if event.masks and missing != self.said:
            self.said = missing
            warnings.warn(missing or "All concepts are found now.", Notice, stacklevel=2)
        done = event.step + (self.before if event.phase in ("joint", "visual") else 0)
        self.bar.update_absolute(done, self.total, self.preview(state, self.caption(event, done)))
        mm.throw_exception_if_processing_interrupted()

    def caption(self, event: StepEvent, done: int) -> str:
        """What runs, how far it is, and about how long it still takes."""
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        before, began = self.first
        said = f"{PHASES[event.phase]}: step {done} of {self.total}"
        if done - before < 3:
            return said
        left = (now - began) / (done - before) * (self.total - done)
        return f"{said}, {say_time(left)} left"

    def preview(self, state: RunState, caption: str = "") -> tuple | None:
        """Return the pictures under their masks, or None if they were shown just now."""
        began = time.monotonic()
        if began - self.shown < max(SECONDS, self.took / SHARE):
            return None
        if self.strip is None:
            names = [concept.name for concept in merge_concepts(e.prompt for e in self.examples)]
            self.strip = Strip.of([example.picture for example in self.examples], names)
        masks: list[NamedMasks] = [
            dict(zip(example.prompt.names, picture.labels, strict=True)) if self.has_masks else {}
            for example, picture in zip(self.examples, state.pictures, strict=True)
        ]
        drawn = self.strip.draw(masks, caption)
        self.shown = time.monotonic()
        self.took = self.shown - began
        return ("JPEG", drawn, LARGEST)
