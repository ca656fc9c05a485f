"""Back to the last whole step: newer ComfyUI raises its interrupt in the middle of one."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ...em_core.method.loop import StepEvent
from ...em_core.method.state import RunState

COUNTERS = ("phase", "step", "settled", "finished")


@dataclass
class Rollback:
    """A listener that remembers the state after every step.

    In the EM phase an E-step may fail after the tokens have moved, so they are remembered too. In the
    joint phase a step changes its weights at its very end, so the rest is enough.
    """

    remembered: dict[str, Any] | None = None

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Remember a whole state."""
        kept: dict[str, Any] = {name: getattr(state, name) for name in COUNTERS}
        kept["generator"] = state.generator.get_state()
        kept["pictures"] = [copy.copy(picture) for picture in state.pictures]
        kept["curves"] = {name: len(points) for name, points in state.curves.items()}
        if state.phase == "em":
            kept["vectors"] = [
                v.detach().clone() for of in state.vectors.values() for v in of.values()
            ]
            kept["optimizer"] = copy.deepcopy(state.optimizer.state_dict())
        self.remembered = kept

    def restore(self, state: RunState) -> bool:
        """Bring the state back to the last whole step; False where there was none."""
        kept = self.remembered
        if kept is None:
            return False
        joint_began = state.phase != kept["phase"]
        for name in COUNTERS:
            setattr(state, name, kept[name])
        state.generator.set_state(kept["generator"])
        state.pictures = kept["pictures"]
        state.curves = {name: state.curves[name][:count] for name, count in kept["curves"].items()}
        if "vectors" in kept and not joint_began:
            parameters = [v for of in state.vectors.values() for v in of.values()]
            with torch.no_grad():
                for v, before in zip(parameters, kept["vectors"], strict=True):
                    v.copy_(before)
            state.optimizer.load_state_dict(kept["optimizer"])
        if joint_began:
            state.weights = {}
        return True
