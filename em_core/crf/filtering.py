"""Gaussian filtering on the lattice: splat, blur, slice; and its symmetric normalisation."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .lattice import Lattice, build_lattice

# Rows of 1, 2 or 4 floats can be copied as single elements, several times faster than as rows.
WIDE = {1: torch.float32, 2: torch.float64, 4: torch.complex128}


@dataclass(frozen=True)
class GroupSums:
    """Weighted sums of a table's rows, one for each group of entries: a sparse matrix.

    Attributes:
        start: first entry of each group, then the number of entries.
        rows: row of the table that each entry takes.
        weights: of the entries.
        table_size: rows of the table.
    """

    start: Int[Tensor, " groups_1"]
    rows: Int[Tensor, " entries"]
    weights: Float[Tensor, " entries"]
    table_size: int

    def __call__(self, table: Float[Tensor, "rows c"]) -> Float[Tensor, "groups c"]:
        """The sums."""
        if not matrix_is_fast(table):
            return F.embedding_bag(
                self.rows,
                table,
                self.start,
                mode="sum",
                per_sample_weights=self.weights,
                include_last_offset=True,
            )
        if table.shape[1] == 1:
            return torch.mv(self.matrix, table.view(-1))[:, None]
        return (self.matrix @ table).contiguous()

    @cached_property
    def matrix(self) -> Shaped[Tensor, "groups rows"]:
        """The same as a sparse matrix, which shares these tensors."""
        size = (len(self.start) - 1, self.table_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.start, self.rows, self.weights, size, check_invariants=False
            )


def matrix_is_fast(table: Float[Tensor, "rows c"]) -> bool:
    """Whether a sparse product beats embedding bags.

    On a GPU, bags leave most of a warp idle at few channels. On a CPU, the bags are faster but for
    MKL's product with a vector.
    """
    if table.device.type == "cuda":
        return True
    return table.shape[1] == 1 and torch.backends.mkl.is_available()


@dataclass(frozen=True)
class LatticeFilter:
    """A linear map of values at n points: splat onto the lattice, blur there, slice back."""

    lattice: Lattice
    splat: GroupSums
    slice: GroupSums

    def __call__(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Filter c channels at once."""
        vertices = take_rows(self.splat(values), self.lattice.splat_group)
        return self.slice(blur(self.lattice, vertices))


def plain_filter(lattice: Lattice) -> LatticeFilter:
    """K of K_ij = exp(-|f_i - f_j|^2 / 2), approximately; the term i = j is included."""
    slice_weights = lattice.barycentric.t() * lattice.alpha
    return LatticeFilter(
        lattice,
        splat_sums(lattice, lattice.barycentric),
        slice_sums(lattice, slice_weights.contiguous()),
    )


def normalised_filter(features: Float[Tensor, "d n"]) -> LatticeFilter:
    """D^-1/2 K D^-1/2 with D = diag(K 1), over points with features in units of K's deviation.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011; the symmetric normalisation is that of their later code.

    Raises:
        UserError: see :func:`build_lattice`.
    """
    lattice = build_lattice(features)
    weights = lattice.barycentric.t().contiguous()
    scale = row_sums(lattice, weights).rsqrt_()
    splat = splat_sums(lattice, lattice.barycentric * scale.t())
    return LatticeFilter(lattice, splat, slice_sums(lattice, weights.mul_(scale * lattice.alpha)))


def row_sums(lattice: Lattice, weights: Float[Tensor, "n classes"]) -> Float[Tensor, "n 1"]:
    """K 1, from the barycentric weights. The splat of ones is a histogram of vertices."""
    count = len(lattice.splat_group)
    splatted = torch.bincount(lattice.vertex.view(-1), weights.view(-1), count)
    blurred = blur(lattice, splatted.to(weights.dtype)[:, None])
    return slice_sums(lattice, weights)(blurred).mul_(lattice.alpha)


def splat_sums(lattice: Lattice, weights: Float[Tensor, "classes n"]) -> GroupSums:
    """Sum the points' values on their vertices, in the order of the splat's groups."""
    grouped = [
        of_class.index_select(0, points)
        for of_class, points in zip(weights, lattice.splat_point, strict=True)
    ]
    points = lattice.splat_point.view(-1)
    return GroupSums(lattice.splat_start, points, torch.cat(grouped), weights.shape[1])


def slice_sums(lattice: Lattice, weights: Float[Tensor, "n classes"]) -> GroupSums:
    """Read each point's value off its vertices."""
    n, classes = weights.shape
    start = classes * torch.arange(n + 1, dtype=torch.int32, device=weights.device)
    return GroupSums(start, lattice.vertex.view(-1), weights.view(-1), len(lattice.splat_group))


def blur(lattice: Lattice, values: Float[Tensor, "vertices_1 c"]) -> Float[Tensor, "vertices_1 c"]:
    """Convolve with [1/2, 1, 1/2] along each lattice direction in turn, in place."""
    for before, after in zip(lattice.before, lattice.after, strict=True):
        around = take_rows(values, before)
        around += take_rows(values, after)
        values.add_(around, alpha=0.5)
    return values


def take_rows(values: Float[Tensor, "m c"], rows: Int[Tensor, " r"]) -> Float[Tensor, "r c"]:
    """values[rows]"""
    wide = WIDE.get(values.shape[1])
    if wide is None:
        return values.index_select(0, rows)
    taken = values.view(wide).view(-1).index_select(0, rows)
    return taken.view(torch.float32).view(len(rows), -1)
