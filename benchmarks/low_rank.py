"""How long it takes to make changed weights low-rank, at the sizes of real models.

    python benchmarks/low_rank.py

The changes are random, so that the time is real and the error is not: it depends on what was learned.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from em_core.exchange.low_rank import low_rank, takes_factors

CROSSED = {"SD 1.5": ((320, 768, 10), (640, 768, 10), (1280, 768, 12)),
           "SDXL": ((640, 2048, 20), (1280, 2048, 120))}  # fmt: skip
"""Of the keys and values of cross-attention: rows, columns, and how many."""


def crossing(model: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for rows, columns, count in CROSSED[model]:
        for number in range(count):
            yield f"unet.block{rows}.{number}.attn2.to_k.weight", (rows, columns)


def whole_unet() -> Iterator[tuple[str, tuple[int, ...]]]:
    """All weights of SD 1.5's UNet, of which only the shapes are made."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    for name, weight in unet.named_parameters():
        yield f"unet.{name}", tuple(weight.shape)


def seconds(shapes: Iterator[tuple[str, tuple[int, ...]]], rank: int) -> tuple[float, int]:
    """Seconds of the CPU that the factors of random changes take, and how many layers have some."""
    g, spent, count = torch.Generator().manual_seed(0), 0.0, 0
    for name, shape in shapes:
        change: Tensor = torch.randn(shape, generator=g)
        if not takes_factors(f"{name}.diff", change):
            continue
        start = time.process_time()
        low_rank({f"{name}.diff": change}, rank)
        spent, count = spent + time.process_time() - start, count + 1
    return spent, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    rank = parser.parse_args().rank
    torch.set_num_threads(1)
    print(f"| rank {rank} | layers | seconds of one CPU core |\n| --- | --- | --- |")
    for what, shapes in (
        ("SD 1.5, cross_attention", crossing("SD 1.5")),
        ("SDXL, cross_attention", crossing("SDXL")),
        ("SD 1.5, full (UNet)", whole_unet()),
    ):
        spent, count = seconds(shapes, rank)
        print(f"| {what} | {count} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
