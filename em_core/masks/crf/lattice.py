"""The permutohedral lattice of a set of points: its vertices and their neighbours."""

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
    """The vertices of the simplices around n points of d features, and the tables for filtering.

    One placeholder vertex, the last, stands in for all neighbours that are not in the lattice. Its
    value is always 0.

    Attributes:
        vertex: the d + 1 vertices of each point's simplex, one of each remainder class.
        barycentric: the points' barycentric weight for the vertex of each class, 0..1.
        splat_point: for each class, all points, grouped by their vertex of that class.
        splat_start: where each vertex's group starts in the flattened `splat_point`, the placeholder's
            empty group included, followed by the number of entries.
        before, after: the neighbours of each vertex along each of the d + 1 directions.
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
        """Number of vertices, including the placeholder."""
        return self.before.shape[1]

    @property
    def alpha(self) -> float:
        """Factor applied when slicing, as in the authors' code."""
        return 1 / (1 + 2.0**-self.dimension)


def build_lattice(features: Float[Tensor, "d n"]) -> Lattice:
    """Build the lattice of n points with 1 to 7 features, in units of the filter's deviation.

    Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
    Eurographics 2010. Vertices are found by sorting integer keys instead of by a hash table.

    Raises:
        UserError: the features span more cells than 64-bit keys can distinguish.
    """
    d, n = features.shape
    if not (1 <= d <= MAX_DIMENSION and n):
        raise ValueError(
            f"Bad features. Expected 1 to {MAX_DIMENSION} for each of one or more points, "
            f"got {d} for {n} points."
        )
    simplices = embed(features)
    numbering = number_cells(simplices.cell)
    classes = [group_points(keys) for keys in keys_by_class(simplices, numbering)]
    *offsets, _ = accumulate((len(groups.keys) for groups in classes), initial=0)
    vertex = [groups.vertex + offset for groups, offset in zip(classes, offsets, strict=True)]
    before, after = neighbours([groups.keys for groups in classes], numbering)
    end = torch.full((2,), (d + 1) * n, dtype=torch.int32, device=features.device)
    return Lattice(
        vertex=torch.stack(vertex, dim=1),
        barycentric=simplices.weights,
        splat_point=torch.stack([groups.point for groups in classes]),
        splat_start=torch.cat([*(groups.start + r * n for r, groups in enumerate(classes)), end]),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Groups:
    """Points grouped by their vertex of one class, of which there are m in all.

    Attributes:
        keys: sorted keys of the vertices.
        vertex: the vertex of each point.
        point: the points of each vertex in turn.
        start: where each vertex's group starts in `point`.
    """

    keys: Int[Tensor, " m"]
    vertex: Int[Tensor, " n"]
    point: Int[Tensor, " n"]
    start: Int[Tensor, " m"]


def group_points(keys: Int[Tensor, " n"]) -> Groups:
    """Group the points that have equal keys."""
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
    """Sort non-negative keys; return them and their original positions. Equal keys keep their order.

    On a CPU, key and position are packed into one integer, which NumPy sorts with vector
    instructions.
    """
    n = len(keys)
    bits = n.bit_length()
    if keys.device.type != "cpu" or int(keys.max()) >= 1 << (63 - bits):
        ordered, position = torch.sort(keys, stable=True)
        return ordered, position
    packed = (keys.to(torch.int64) << bits).add_(torch.arange(n))
    packed.numpy().sort()
    return (packed >> bits).to(keys.dtype), packed.bitwise_and_((1 << bits) - 1)


def neighbours(
    vertices: list[Tensor], numbering: Numbering
) -> tuple[Int[Tensor, "classes vertices_1"], Int[Tensor, "classes vertices_1"]]:
    """The two neighbours of each vertex along each direction, or the placeholder if there is none.

    From a vertex to the neighbour before it along j, coordinate j grows by d and all others shrink
    by 1. That neighbour is of the previous class and one cell up along j; from class 0, it is of
    class d and one cell down along all other coordinates. With class 0 taken last, the wanted keys
    come out sorted, as the vertices are.

    Args:
        vertices: sorted keys of the vertices of each class.
    """
    d, span, dtype = len(numbering.strides), numbering.span, numbering.shared_dtype
    shared = torch.cat([keys.to(dtype) + r * span for r, keys in enumerate(vertices)])
    m, class_0 = len(shared), len(vertices[0])
    below = d * span - sum(numbering.strides)
    wanted = torch.cat([shared[class_0:] - span, shared[:class_0] + below])
    source = torch.arange(m, dtype=torch.int32, device=shared.device).roll(-class_0)
    before = source.new_full((d + 1, m + 1), m)
    after = source.new_full((d + 1, m + 1), m)
    # In the merged list, the lowest bit distinguishes wanted keys from those of vertices.
    shared, wanted = shared.mul_(2), wanted.mul_(2).add_(1)
    merged = shared.new_empty(2 * m)
    for j, stride in enumerate((*numbering.strides, 0)):
        merged[:m] = shared
        torch.add(wanted, 2 * stride, out=merged[m:])
        target, position = matches(merge(merged))
        start = source.index_select(0, position).long()
        before[j].scatter_(0, start, target.to(torch.int32))
        after[j].scatter_(0, target, start.to(torch.int32))
    return before, after


def matches(
    merged: Shaped[Tensor, " m_2"],
) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]]:
    """Find the pairs of an even number and the next odd one.

    Args:
        merged: distinct numbers, sorted.

    Returns:
        The positions of the pairs' even numbers among all even ones, and of their odd numbers among
        all odd ones.
    """
    hit = nonzero(merged[1:] ^ merged[:-1] == 1)
    position = torch.cumsum(merged & 1, 0, dtype=torch.int32).index_select(0, hit).long()
    return hit - position, position


def merge(runs: Shaped[Tensor, " m"]) -> Shaped[Tensor, " m"]:
    """Merge two sorted runs, in place on a CPU, where NumPy's stable sort recognises the runs."""
    if runs.device.type == "cpu":
        runs.numpy().sort(kind="stable")
        return runs
    return torch.sort(runs).values


def is_first(ordered: Shaped[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Whether each entry of a sorted list differs from the previous one."""
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    return first


def nonzero(flags: Bool[Tensor, " n"]) -> Int[Tensor, " hits"]:
    """Indices of the true entries. On a CPU, NumPy finds them faster than PyTorch."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().view(-1)
