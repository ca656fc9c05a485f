"""The permutohedral lattice of a set of points: its vertices, and which are neighbours."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .embedding import embed
from .numbering import Numbering, keys_by_class, number_cells

MAX_DIMENSION = 7


@dataclass(frozen=True)
class Lattice:
    """Vertices that n points of d features touch, and the tables that a filter walks along.

    A further vertex after the last stands for every one that is missing; its value is always 0.

    Attributes:
        vertex: the d + 1 vertices of each point, one of each class.
        barycentric: weights of each class's vertex of the points, 0..1.
        splat_point: for each class, its points grouped by the vertex that they touch.
        splat_start: first entry of each vertex's group, the missing one's too, then the end.
        before, after: neighbours of each vertex along each of the d + 1 directions.
    """

    vertex: Int[Tensor, "n classes"]
    barycentric: Float[Tensor, "classes n"]
    splat_point: Int[Tensor, "classes n"]
    splat_start: Int[Tensor, " vertices_2"]
    before: Int[Tensor, "classes vertices_1"]
    after: Int[Tensor, "classes vertices_1"]

    @property
    def dimension(self) -> int:
        """d, the number of features of a point."""
        return len(self.before) - 1

    @property
    def size(self) -> int:
        """Number of vertices, the missing one included."""
        return self.before.shape[1]

    @property
    def alpha(self) -> float:
        """Scale of what is sliced back, as in the authors' code."""
        return 1 / (1 + 2.0**-self.dimension)


def build_lattice(features: Float[Tensor, "d n"]) -> Lattice:
    """Lattice of n points with d = 1 to 7 features in units of the filter's standard deviation.

    Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
    Eurographics 2010, with a sort of integer keys in place of the hash table.

    Raises:
        UserError: the features spread over more cells than 64-bit keys can tell apart.
    """
    d, n = features.shape
    if not (1 <= d <= MAX_DIMENSION and n):
        raise ValueError(
            f"Bad features. Expected 1 to {MAX_DIMENSION} for each point, got {d} for {n}."
        )
    simplices = embed(features)
    numbering = number_cells(simplices.cell)
    classes = [group_points(keys) for keys in keys_by_class(simplices, numbering)]
    *bases, _ = accumulate((len(groups.keys) for groups in classes), initial=0)
    before, after = neighbours([groups.keys for groups in classes], numbering)
    end = torch.full((2,), (d + 1) * n, dtype=torch.int32, device=features.device)
    return Lattice(
        vertex=torch.stack([g.vertex + base for g, base in zip(classes, bases, strict=True)], 1),
        barycentric=simplices.weights,
        splat_point=torch.stack([groups.point for groups in classes]),
        splat_start=torch.cat([*(groups.start + r * n for r, groups in enumerate(classes)), end]),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Groups:
    """Points grouped by their vertex of one class, m vertices in all.

    Attributes:
        keys: of the vertices, sorted.
        vertex: vertex of each point.
        point: points of the groups, which follow the vertices' order.
        start: where each group begins.
    """

    keys: Int[Tensor, " m"]
    vertex: Int[Tensor, " n"]
    point: Int[Tensor, " n"]
    start: Int[Tensor, " m"]


def group_points(keys: Int[Tensor, " n"]) -> Groups:
    """Group points of equal keys."""
    ordered, point = sort_stable(keys)
    first = is_first(ordered)
    start = nonzero(first)
    number = torch.cumsum(first, 0, dtype=torch.int32).sub_(1)
    return Groups(
        keys=ordered.index_select(0, start),
        vertex=torch.empty_like(number).scatter_(0, point, number),
        point=point.to(torch.int32),
        start=start.to(torch.int32),
    )


def sort_stable(keys: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Keys (none negative) in order, and where each was; equal ones keep their order.

    On a CPU, key and place are packed into one integer: NumPy sorts those with vector instructions.
    """
    n = len(keys)
    bits = n.bit_length()
    if keys.device.type != "cpu" or int(keys.max()) >= 1 << (63 - bits):
        ordered, place = torch.sort(keys, stable=True)
        return ordered, place
    packed = (keys.to(torch.int64) << bits).add_(torch.arange(n))
    packed.numpy().sort()
    return (packed >> bits).to(keys.dtype), packed.bitwise_and_((1 << bits) - 1)


def neighbours(
    vertices: list[Tensor], numbering: Numbering
) -> tuple[Int[Tensor, "classes vertices_1"], Int[Tensor, "classes vertices_1"]]:
    """Both neighbours of each vertex along each direction; the missing vertex where there is none.

    The neighbour before, along j, has every coordinate less by 1 and the j-th more by d: it is of
    the class before, one cell up along j. For class 0 it is of class d, one cell down along all
    others. With class 0 taken last, the wanted keys are sorted as the vertices are.

    Args:
        vertices: sorted keys of each class.
    """
    d, span, dtype = len(numbering.strides), numbering.span, numbering.shared_dtype
    shared = torch.cat([keys.to(dtype) + r * span for r, keys in enumerate(vertices)])
    m, zeros = len(shared), len(vertices[0])
    below = d * span - sum(numbering.strides)
    wanted = torch.cat([shared[zeros:] - span, shared[:zeros] + below])
    source = torch.arange(m, dtype=torch.int32, device=shared.device).roll(-zeros)
    before = source.new_full((d + 1, m + 1), m)
    after = source.new_full((d + 1, m + 1), m)
    # The lowest bit tells the two apart in a merged list.
    shared, wanted = shared.mul_(2), wanted.mul_(2).add_(1)
    merged = shared.new_empty(2 * m)
    for j, stride in enumerate((*numbering.strides, 0)):
        merged[:m] = shared
        torch.add(wanted, 2 * stride, out=merged[m:])
        target, place = matches(merge(merged))
        start = source.index_select(0, place).long()
        before[j].scatter_(0, start, target.to(torch.int32))
        after[j].scatter_(0, target, start.to(torch.int32))
    return before, after


def matches(
    merged: Shaped[Tensor, " m_2"],
) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]]:
    """Where in the even and where in the odd numbers those are that differ by their lowest bit alone.

    Args:
        merged: distinct numbers, sorted.
    """
    hit = nonzero(merged[1:] ^ merged[:-1] == 1)
    place = torch.cumsum(merged & 1, 0, dtype=torch.int32).index_select(0, hit).long()
    return hit - place, place


def merge(runs: Shaped[Tensor, " m"]) -> Shaped[Tensor, " m"]:
    """Sort two sorted runs, in place on a CPU. NumPy's stable sort sees the runs and merges them."""
    if runs.device.type == "cpu":
        runs.numpy().sort(kind="stable")
        return runs
    return torch.sort(runs).values


def is_first(ordered: Shaped[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether each entry of a sorted list differs from the one before."""
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    return first


def nonzero(flags: Bool[Tensor, " n"]) -> Int[Tensor, " hits"]:
    """Indices of the true entries; NumPy's is the faster on a CPU."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().view(-1)
