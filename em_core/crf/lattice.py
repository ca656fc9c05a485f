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
        splat_point: points grouped by the vertex that they touch. Groups follow their first points
            within each class, so that one after the other reads the picture from top to bottom.
        splat_start: first entry of each group, then of the missing vertex's, then the end.
        splat_group: group of each vertex.
        before, after: neighbours of each vertex along each of the d + 1 directions.
    """

    vertex: Int[Tensor, "n classes"]
    barycentric: Float[Tensor, "classes n"]
    splat_point: Int[Tensor, "classes n"]
    splat_start: Int[Tensor, " vertices_2"]
    splat_group: Int[Tensor, " vertices_1"]
    before: Int[Tensor, "classes vertices_1"]
    after: Int[Tensor, "classes vertices_1"]

    @property
    def dimension(self) -> int:
        """d, the number of features of a point."""
        return len(self.before) - 1

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
    *bases, count = accumulate((len(groups.keys) for groups in classes), initial=0)
    numbered = list(zip(classes, bases, strict=True))
    before, after = neighbours([groups.keys for groups in classes], numbering)
    end = torch.full((2,), (d + 1) * n, dtype=torch.int32, device=features.device)
    missing = end.new_full((1,), count)
    return Lattice(
        vertex=torch.stack([groups.vertex + base for groups, base in numbered], dim=1),
        barycentric=simplices.weights,
        splat_point=torch.stack([groups.point for groups in classes]),
        splat_start=torch.cat([*(groups.start + r * n for r, groups in enumerate(classes)), end]),
        splat_group=torch.cat([*(groups.place + base for groups, base in numbered), missing]),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Groups:
    """Points grouped by their vertex of one class, m vertices in all.

    Attributes:
        keys: of the vertices, sorted.
        vertex: vertex of each point.
        point: points of the groups.
        start: where each group begins.
        place: which of the groups is each vertex's.
    """

    keys: Int[Tensor, " m"]
    vertex: Int[Tensor, " n"]
    point: Int[Tensor, " n"]
    start: Int[Tensor, " m"]
    place: Int[Tensor, " m"]


def group_points(keys: Int[Tensor, " n"]) -> Groups:
    """Group points of equal keys, groups in the order of their first points."""
    n = len(keys)
    ordered, order = torch.sort(keys, stable=True)
    first = is_first(ordered)
    begin = nonzero(first)
    number = torch.cumsum(first, 0, dtype=torch.int32).sub_(1)
    by_place = torch.argsort(order.index_select(0, begin))
    sizes = torch.diff(begin, append=begin.new_full((1,), n)).index_select(0, by_place)
    start = torch.cumsum(sizes, 0).sub_(sizes)
    shift = torch.empty_like(begin).scatter_(0, by_place, start).sub_(begin)
    target = shift.index_select(0, number).add_(torch.arange(n, device=keys.device))
    place = torch.arange(len(begin), device=keys.device)
    return Groups(
        keys=ordered.index_select(0, begin),
        vertex=torch.empty_like(number).scatter_(0, order, number),
        point=torch.empty_like(number).scatter_(0, target, order.to(torch.int32)),
        start=start.to(torch.int32),
        place=torch.empty_like(place).scatter_(0, by_place, place).to(torch.int32),
    )


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
    for j, stride in enumerate((*numbering.strides, 0)):
        target, place = match(shared, wanted + stride)
        start = source.index_select(0, place)
        before[j].scatter_(0, start.long(), target)
        after[j].scatter_(0, target.long(), start)
    return before, after


def match(
    keys: Shaped[Tensor, " m"], wanted: Shaped[Tensor, " m"]
) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]]:
    """Where in `keys`, and where in `wanted`, the keys are that both have; each is sorted and unique.

    The lowest bit of the merged list tells the two apart, so it alone has to be sorted.
    """
    merged = merge(torch.cat([keys * 2, wanted * 2 + 1]))
    is_wanted = merged & 1
    seen = torch.cumsum(is_wanted, 0, dtype=torch.int32)
    hit = nonzero((merged[1:] == merged[:-1] + 1) & is_wanted[1:].bool())
    place = seen.index_select(0, hit)
    return hit.to(torch.int32) - place, place


def merge(runs: Shaped[Tensor, " m"]) -> Shaped[Tensor, " m"]:
    """Sort two sorted runs. NumPy's stable sort sees the runs and merges; torch's sorts anew."""
    if runs.device.type == "cpu":
        return torch.from_numpy(np.sort(runs.numpy(), kind="stable"))
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
