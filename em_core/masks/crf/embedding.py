"""Where points lie in the permutohedral lattice: the simplex around each, and its corner weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

CHUNK = 1 << 16


@dataclass(frozen=True)
class Simplices:
    """The simplex around each of n points: d + 1 corners, one of each remainder class.

    Attributes:
        cell: corner of class 0, its first d coordinates divided by d + 1 (whole numbers).
        rank: place of each coordinate among the point's offsets from that corner, largest first.
        weights: barycentric weight of each class's corner, 0..1; those of a point sum to 1.
    """

    cell: Float[Tensor, "d n"]
    rank: Int8[Tensor, "d n"]
    weights: Float[Tensor, "classes n"]


def embed(features: Float[Tensor, "d n"]) -> Simplices:
    """Find the simplex of each point (Adams, Baek, Davis 2010, section 3.1 and appendix).

    Arithmetic is float32 in the order of Kraehenbuehl and Koltun's implementation (2011), without
    fused multiply-adds, so that both find the same simplex for the same features. On a CPU the
    points pass in chunks that fit its cache.
    """
    d, n = features.shape
    cell = features.new_empty(d, n)
    rank = torch.empty(d, n, dtype=torch.int8, device=features.device)
    weights = features.new_empty(d + 1, n)
    for part in chunks(features):
        elevated = elevate(features[:, part])
        corner, ranks = nearest_corner(elevated)
        cell[:, part], rank[:, part] = corner[:d], ranks[:d]
        barycentric(elevated, corner, out=weights[:, part])
    return Simplices(cell, rank, weights)


def chunks(columns: Shaped[Tensor, "d n"]) -> Iterator[slice]:
    """Parts of the columns to work on at a time."""
    n = columns.shape[1]
    step = CHUNK if columns.device.type == "cpu" else n
    return (slice(start, start + step) for start in range(0, n, step))


def elevate(features: Float[Tensor, "d n"]) -> Float[Tensor, "classes n"]:
    """Map features into the hyperplane of coordinate sum 0 (y = E p, p. 5), scaled so that the
    splat, blur and slice together have unit standard deviation (p. 6)."""
    d = len(features)
    elevated = features.new_empty(d + 1, features.shape[1])
    partial = torch.zeros_like(features[0])
    for j, scale in reversed(list(enumerate(scale_factors(d), start=1))):
        scaled = features[j - 1] * scale
        torch.sub(partial, scaled * float(j), out=elevated[j])
        partial = partial + scaled
    elevated[0] = partial
    return elevated


def scale_factors(d: int) -> list[float]:
    """Diagonal part of E, rounded to float32 where the reference rounds."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    return [float(np.float32(1 / math.sqrt((i + 2) * (i + 1)) * deviation)) for i in range(d)]


def nearest_corner(
    elevated: Float[Tensor, "classes n"],
) -> tuple[Float[Tensor, "classes n"], Int8[Tensor, "classes n"]]:
    """Closest lattice point of remainder 0, divided by d + 1, and the rank of each coordinate.

    Rounding each coordinate alone may leave the hyperplane; as many of the worst rounded
    coordinates as the sum is off are moved by one step.
    """
    classes = len(elevated)
    corner = (elevated * inverse(classes)).round_()
    excess = corner.sum(dim=0).to(torch.int8)
    rank = descending_rank(elevated - corner * float(classes)).add_(excess)
    moved = (rank < 0).view(torch.int8) - (rank >= classes).view(torch.int8)
    return corner.add_(moved), rank.add_(moved, alpha=classes)


def inverse(classes: int) -> float:
    """1 / (d + 1) in float32."""
    return float(np.float32(1) / np.float32(classes))


def descending_rank(rows: Float[Tensor, "r n"]) -> Int8[Tensor, "r n"]:
    """Rank of each row's entry in its column, 0 for the largest; of equals the first row leads."""
    count = len(rows)
    rank = torch.arange(count, dtype=torch.int8, device=rows.device)[:, None].repeat(
        1, rows.shape[1]
    )
    for i in range(count):
        for j in range(i + 1, count):
            smaller = (rows[i] < rows[j]).view(torch.int8)
            rank[i] += smaller
            rank[j] -= smaller
    return rank


def barycentric(
    elevated: Float[Tensor, "classes n"],
    corner: Float[Tensor, "classes n"],
    out: Float[Tensor, "classes n"],
) -> None:
    """Weights of the simplex's corners (p. 10): differences of the sorted offsets."""
    classes = len(elevated)
    offsets = elevated.sub_(corner * float(classes)).mul_(inverse(classes))
    rows = sort_descending(list(offsets.unbind(0)))
    torch.add(rows[-1], 1 - rows[0], out=out[0])
    for k in range(1, classes):
        torch.sub(rows[-1 - k], rows[-k], out=out[k])


def sort_descending(rows: list[Tensor]) -> list[Tensor]:
    """Sort the columns by a network of comparators: whole-row minima and maxima beat a sort of
    many columns a few entries long."""
    for last in range(len(rows) - 1, 0, -1):
        for j in range(last):
            rows[j], rows[j + 1] = (
                torch.maximum(rows[j], rows[j + 1]),
                torch.minimum(rows[j], rows[j + 1]),
            )
    return rows
