"""Embedding of points in the permutohedral lattice: enclosing simplices and barycentric weights."""

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
    """The simplices that enclose n points; each has d + 1 corners, one of each remainder class.

    Attributes:
        cell: the first d coordinates of the corner of class 0, divided by d + 1 (whole numbers).
        rank: rank of each coordinate of the point's offset from that corner, 0 for the largest.
        weights: barycentric weight of each class's corner, 0..1; a point's weights sum to 1.
    """

    cell: Float[Tensor, "d n"]
    rank: Int8[Tensor, "d n"]
    weights: Float[Tensor, "classes n"]


def embed(features: Float[Tensor, "d n"]) -> Simplices:
    """Find the simplex of each point (Adams, Baek, Davis 2010, section 3.1 and appendix).

    Arithmetic is in float32, in the order of Kraehenbuehl and Koltun's implementation (2011) and
    without fused multiply-adds, so that both find the same simplex for the same features. On a CPU
    the points are processed in chunks that fit into its cache.
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
    """Ranges of columns to process together: chunks that fit into a CPU's cache; elsewhere, all."""
    n = columns.shape[1]
    step = CHUNK if columns.device.type == "cpu" else n
    return (slice(start, start + step) for start in range(0, n, step))


def elevate(features: Float[Tensor, "d n"]) -> Float[Tensor, "classes n"]:
    """Map features into the hyperplane where coordinates sum to 0 (y = E p, p. 5).

    The scale gives splat, blur and slice together a standard deviation of 1 (p. 6).
    """
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
    """Diagonal part of E, rounded to float32 wherever the authors' code rounds."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    return [float(np.float32(1 / math.sqrt((i + 2) * (i + 1)) * deviation)) for i in range(d)]


def nearest_corner(
    elevated: Float[Tensor, "classes n"],
) -> tuple[Float[Tensor, "classes n"], Int8[Tensor, "classes n"]]:
    """Nearest lattice point of remainder 0, divided by d + 1, and the rank of each coordinate.

    Rounding coordinates independently may leave the hyperplane. If their sum is off by s, the s
    coordinates with the largest rounding errors are moved back by one step each.
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
    """Rank of each entry within its column, 0 for the largest; ties go to the earlier row."""
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
    """Write the barycentric weights of the corners (p. 10): differences of the sorted offsets.

    The elevated points are overwritten.
    """
    classes = len(elevated)
    offsets = elevated.sub_(corner * float(classes)).mul_(inverse(classes))
    rows = sort_descending(list(offsets.unbind(0)))
    torch.add(rows[-1], 1 - rows[0], out=out[0])
    for k in range(1, classes):
        torch.sub(rows[-1 - k], rows[-k], out=out[k])


def sort_descending(rows: list[Tensor]) -> list[Tensor]:
    """Sort each column with a sorting network.

    Minima and maxima of whole rows are faster than sorting many columns of a few entries each.
    """
    for last in range(len(rows) - 1, 0, -1):
        for j in range(last):
            rows[j], rows[j + 1] = (
                torch.maximum(rows[j], rows[j + 1]),
                torch.minimum(rows[j], rows[j + 1]),
            )
    return rows
