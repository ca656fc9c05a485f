"""The permutohedral lattice of a set of points: its vertices, and which are neighbours."""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..errors import UserError
from .embedding import CHUNK, Simplices, embed

MAX_DIMENSION = 7


@dataclass(frozen=True)
class Lattice:
    """Vertices that n points of d features touch, and the tables that a filter walks along.

    An extra vertex after the last stands for every missing one; its value is always 0.

    Attributes:
        slice_vertex: the d + 1 vertices of each point.
        slice_weight: barycentric weights that go with them.
        splat_point: points grouped by the vertex they touch.
        splat_weight: barycentric weights that go with them.
        splat_start: first entry of each vertex's group, then that of the extra one, then the end.
        before, after: neighbours of each vertex along each of the d + 1 directions.
    """

    slice_vertex: Int[Tensor, "n classes"]
    slice_weight: Float[Tensor, "n classes"]
    splat_point: Int[Tensor, " entries"]
    splat_weight: Float[Tensor, " entries"]
    splat_start: Int[Tensor, " vertices_2"]
    before: Int[Tensor, "classes vertices_1"]
    after: Int[Tensor, "classes vertices_1"]

    @property
    def dimension(self) -> int:
        """d, the number of features of a point."""
        return len(self.before) - 1


def build_lattice(features: Float[Tensor, "d n"]) -> Lattice:
    """Lattice of n points with d = 1 to 7 features in units of the filter's standard deviation.

    Source: Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice",
    Eurographics 2010. Their hash table becomes one sort of integer keys.

    Raises:
        UserError: the features spread over more cells than 64-bit keys can count.
    """
    d, n = features.shape
    if not 1 <= d <= MAX_DIMENSION:
        raise ValueError(f"Bad number of features. Expected 1 to {MAX_DIMENSION}, got {d}.")
    simplices = embed(features)
    keys, numbering = corner_keys(simplices)
    weights = simplices.weights
    del simplices
    sorted_keys, order = torch.sort(keys.view(-1))
    del keys
    vertices, vertex_of, counts = torch.unique_consecutive(
        sorted_keys, return_inverse=True, return_counts=True
    )
    del sorted_keys
    splat_weight = weights.view(-1).index_select(0, order)
    # Each class fills n places of the order, because its keys lie in a range of their own.
    order.view(d + 1, n).sub_(n * torch.arange(d + 1, device=order.device)[:, None])
    slice_vertex = order.new_empty(d + 1, n, dtype=torch.int32)
    slice_vertex.scatter_(1, order.view(d + 1, n), vertex_of.to(torch.int32).view(d + 1, n))
    del vertex_of
    before, after = neighbours(vertices, numbering)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    return Lattice(
        slice_vertex=slice_vertex.t().contiguous(),
        slice_weight=weights.t().contiguous(),
        splat_point=order.to(torch.int32),
        splat_weight=splat_weight,
        splat_start=torch.cat([ends.new_zeros(1), ends, ends[-1:]]),
        before=before,
        after=after,
    )


@dataclass(frozen=True)
class Numbering:
    """How a vertex becomes one integer: its class, then its cell's coordinates as mixed digits.

    Attributes:
        low: least digit of each coordinate.
        strides: value of a step along each coordinate.
        span: number of keys set aside for each class.
        dtype: int32 where all keys fit, else int64.
    """

    low: tuple[int, ...]
    strides: tuple[int, ...]
    span: int
    dtype: torch.dtype


def number_cells(cell: Float[Tensor, "d n"]) -> Numbering:
    """Numbering with room for every corner of the cells and for those corners' neighbours."""
    least, most = (bound.tolist() for bound in torch.aminmax(cell, dim=1))
    sizes = [int(high - low) + 5 for low, high in zip(least, most, strict=True)]
    strides = tuple(accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1]
    span = math.prod(sizes)
    total = span * (len(sizes) + 1)
    if total >= 2**63:
        raise UserError(
            "The CRF's thetas are too small for this picture: its lattice would have "
            f"{total:.0e} cells, expected fewer than 9e+18. Use a larger theta."
        )
    dtype = torch.int32 if total < 2**31 else torch.int64
    return Numbering(tuple(int(low) - 2 for low in least), strides, span, dtype)


def corner_keys(simplices: Simplices) -> tuple[Shaped[Tensor, "classes n"], Numbering]:
    """Keys of the corners of each simplex.

    Corner r is the cell minus one along each of the r coordinates of highest rank, so a table of
    all subsets of coordinates gives the step from the cell's key.
    """
    cell, rank = simplices.cell, simplices.rank
    d, n = cell.shape
    numbering = number_cells(cell)
    steps = subset_steps(numbering, cell.device)
    keys = torch.empty(d + 1, n, dtype=numbering.dtype, device=cell.device)
    step = CHUNK if cell.device.type == "cpu" else max(n, 1)
    for part in (slice(start, start + step) for start in range(0, n, step)):
        keys[0, part] = base = cell_keys(cell[:, part], numbering)
        for r in range(1, d + 1):
            chosen = subset(rank[:, part], d - r)
            torch.add(base, steps[r].index_select(0, chosen), out=keys[r, part])
    return keys, numbering


def cell_keys(cell: Float[Tensor, "d n"], numbering: Numbering) -> Int[Tensor, " n"]:
    """Keys of class-0 corners."""
    terms = zip(cell, numbering.low, numbering.strides, strict=True)
    digits = ((row - low).to(numbering.dtype) * stride for row, low, stride in terms)
    total = next(digits)
    for digit in digits:
        total = total + digit
    return total


def subset(rank: Shaped[Tensor, "d n"], above: int) -> Int[Tensor, " n"]:
    """Bit i of the result tells whether coordinate i has a rank over `above`."""
    bits = (rank[0] > above).view(torch.int8)
    for i in range(1, len(rank)):
        bits = bits | ((rank[i] > above).view(torch.int8) << i)
    return bits.to(torch.int32)


def subset_steps(numbering: Numbering, device: torch.device) -> Int[Tensor, "classes subsets"]:
    """Step from a cell's key to its corner of class r, for each subset of coordinates."""
    d = len(numbering.strides)
    lowered = [
        sum(stride for i, stride in enumerate(numbering.strides) if chosen >> i & 1)
        for chosen in range(2**d)
    ]
    rows = [[r * numbering.span - step for step in lowered] for r in range(d + 1)]
    return torch.tensor(rows, dtype=numbering.dtype, device=device)


def neighbours(
    vertices: Shaped[Tensor, " m"], numbering: Numbering
) -> tuple[Int[Tensor, "classes vertices_1"], Int[Tensor, "classes vertices_1"]]:
    """Both neighbours of each vertex along each direction; m where there is none.

    The first neighbour along j has every coordinate less by 1, the j-th more by d: it lies in the
    class before, one cell up along j. Taking class 0 after the others keeps the wanted keys
    sorted, as the vertices are, so that they can be matched by a merge.
    """
    m, d = len(vertices), len(numbering.strides)
    zeros = int(torch.searchsorted(vertices, numbering.span))
    down = d * numbering.span - sum(numbering.strides)
    wanted = torch.cat([vertices[zeros:] - numbering.span, vertices[:zeros] + down])
    source = torch.arange(m, dtype=torch.int32, device=vertices.device).roll(-zeros)
    before = source.new_full((d + 1, m + 1), m)
    after = source.new_full((d + 1, m + 1), m)
    for j, stride in enumerate((*numbering.strides, 0)):
        place, target = match(vertices, wanted + stride)
        start = source.index_select(0, place)
        before[j].index_copy_(0, start, target.to(torch.int32))
        after[j].index_copy_(0, target, start)
    return before, after


def match(
    keys: Shaped[Tensor, " m"], wanted: Shaped[Tensor, " m"]
) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]]:
    """Places in `wanted` whose key exists, and where it is. Both are sorted and free of doubles."""
    merged, order = torch.sort(torch.cat([keys, wanted]), stable=True)
    hit = (merged[1:] == merged[:-1]).nonzero().view(-1)
    return order.index_select(0, hit + 1) - len(keys), order.index_select(0, hit)
