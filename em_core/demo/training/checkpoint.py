"""Checkpoints of a round, so that an interrupted one goes on where it was."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .schedule import AveragedWeights


@dataclass(frozen=True)
class Checkpoint:
    """A file with everything that a round needs to go on, written every `every` steps."""

    path: Path
    every: int = 200

    def load(
        self, model: nn.Module, average: AveragedWeights, optimiser: torch.optim.Optimizer
    ) -> int:
        """Set everything to what the file holds, if there is one; returns the steps done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        average.steps = state["step"]
        return state["step"]

    def save(
        self,
        step: int,
        model: nn.Module,
        average: AveragedWeights,
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Write the file aside, then rename it into place."""
        state = {
            "step": step,
            "model": model.state_dict(),
            "average": average.module.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(self.path.name + ".part")
        torch.save(state, aside)
        os.replace(aside, self.path)
