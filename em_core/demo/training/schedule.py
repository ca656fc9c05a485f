"""Learning rates, memory layout, averaged weights and the training log."""

import copy
import json
import math
from pathlib import Path
from time import time

import torch
from torch import nn


def cosine_rate(progress: float, step: int, warmup: int = 100, floor: float = 0.01) -> float:
    """Factor of the peak learning rate; `progress` runs from 0 to 1."""
    return min(1.0, (step + 1) / warmup) * (
        floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))
    )


def lay_out_channels_last(module: nn.Module) -> None:
    """Store convolutions' weights as the CPU's faster kernels want them; values stay."""
    for p in module.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


class AveragedWeights:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


class Log:
    """A training log of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time()

    def write(self, **values: object) -> None:
        """Append one record; the seconds since the start are added."""
        record = {"seconds": round(time() - self.start, 1), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
