"""The exact filter written as attention against the lattice: time and error of filtering once.

    python benchmarks/crf_attention.py [--device cuda]

With q = [f, 1] and k = [f, -|f|^2 / 2], softmax(q k^T) is D^-1 K, so D^-1/2 K D^-1/2 Q is
sqrt(n) * attention(q, k, Q / sqrt(n)) with n = K 1. Its cost grows with the square of the pixels.
Results: benchmarks/results/crf_attention*.json and .md.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from crf import describe, seconds
from crf_data import photo_folders, read_photo, table, write
from torch import Tensor

from em_core.masks.crf import CUTLER
from em_core.masks.crf.features import bilateral_features
from em_core.masks.crf.filtering import normalised_filter

CHUNK = 1024


class ExactFilter:
    """D^-1/2 K D^-1/2 over all pairs of pixels."""

    def __init__(self, features: Tensor) -> None:
        f = (features - features.mean(dim=1, keepdim=True)).T
        half = 0.5 * f.square().sum(dim=1, keepdim=True)
        padding = -(f.shape[1] + 1) % 8
        self.query = F.pad(torch.cat([f, torch.ones_like(half)], dim=1), (0, padding))
        self.key = F.pad(torch.cat([f, -half], dim=1), (0, padding))
        parts = [
            torch.logsumexp(rows @ self.key.T, dim=1, keepdim=True)
            for rows in self.query.split(CHUNK)
        ]
        self.root = torch.exp(0.5 * (torch.cat(parts) - half))

    def __call__(self, values: Tensor) -> Tensor:
        value = F.pad(values / self.root, (0, self.query.shape[1] - values.shape[1]))
        attended = F.scaled_dot_product_attention(
            self.query[None, None], self.key[None, None], value[None, None], scale=1.0
        )
        return self.root * attended[0, 0, :, : values.shape[1]]


def compare(side: int, device: torch.device) -> dict[str, float]:
    """Milliseconds to build, and to filter three channels (best of three); and the lattice's error."""
    image = read_photo(photo_folders()[0], side)[0].to(device) * 255
    features = bilateral_features(
        image, CUTLER.bilateral_theta_xy * CUTLER.scale(side, side), CUTLER.bilateral_theta_rgb
    )
    values = torch.rand(side * side, 3, generator=torch.Generator().manual_seed(0)).to(device)
    row: dict[str, float] = {"side": side}
    filters: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(name: str, make: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> None:
        filters[name] = make(features)

    for name, make in (("lattice", normalised_filter), ("attention", ExactFilter)):
        row[f"{name} build"] = 1e3 * seconds(partial(build, name, make), device)
        tries = 3 if name == "lattice" or side < 192 else 1
        times = [seconds(partial(filters[name], values), device) for _ in range(tries)]
        row[f"{name} filter"] = 1e3 * min(times)
    smooth = image.mean(dim=0).view(-1, 1) / 255
    lattice, exact = filters["lattice"](smooth), filters["attention"](smooth)
    row["difference"] = float((lattice - exact).abs().mean() / exact.abs().mean())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 192, 256])
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    rows = [compare(side, device) for side in args.sides]
    head = list(rows[0])
    cells = [
        [f"{row[name]:.0f}" if name == "side" else f"{row[name]:.3g}" for name in head]
        for row in rows
    ]
    text = "# Exact filter as attention, against the lattice (ms; bilateral kernel, 3 channels)\n\n"
    text += f"{describe(device)}, one thread\n\n{table(head, cells)}"
    name = "crf_attention" if device.type == "cpu" else f"crf_attention_{device.type}"
    write(f"{name}.json", json.dumps(rows, indent=1) + "\n")
    write(f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
