"""The numbers: similarities, mixing, diversity, and their intervals; functions of vectors alone."""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "_n d"]


def similarities(
    crops: Sequence[Float[Tensor, " d"] | None], references: Sequence[Vectors]
) -> Float[Tensor, "k c"]:
    """Return the mean cosine of each crop with each concept's references.

    Args:
        crops: unit vectors of the k crops of a picture; None for a concept that was not found, whose
            row is 0.
        references: unit vectors of the references of c concepts.
    """
    rows = [
        torch.stack([(of @ crop).mean() for of in references])
        if crop is not None
        else torch.zeros(len(references))
        for crop in crops
    ]
    return torch.stack(rows)


def among_references(references: Sequence[Vectors]) -> Float[Tensor, "c c"]:
    """Return the mean cosine of each concept's references with each other's.

    A reference is not compared with itself; a concept with one reference has 1 with its own.
    """
    count = len(references)
    table = torch.ones(count, count)
    for i, first in enumerate(references):
        for j, second in enumerate(references):
            products = first @ second.T
            if i != j:
                table[i, j] = products.mean()
            elif len(first) > 1:
                off = ~torch.eye(len(first), dtype=torch.bool)
                table[i, j] = products[off].mean()
    return table


def detect_and_compare(found: Float[Tensor, "k k"], truth: Float[Tensor, "k k"]) -> float:
    """Return 1 minus the squared Frobenius norm of the difference of two tables of similarities.

    Source: Detect-and-Compare of MuDI (Jang et al. 2024, arXiv 2404.04243), here with the method's own
    masks in place of a detector.

    Args:
        found: of the crops in a picture with the references.
        truth: of the references among themselves.
    """
    return float(1 - (found - truth).square().sum())


def pairwise(count: int, distance: Callable[[int, int], float]) -> float | None:
    """Return the mean of a distance over all pairs of `count` things; None for fewer than two."""
    found = [distance(i, j) for i, j in combinations(range(count), 2)]
    return sum(found) / len(found) if found else None


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95% interval by Student's t; None for fewer than two values."""
    from scipy.stats import t

    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * deviation / sqrt(count)
