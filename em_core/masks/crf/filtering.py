"""Gaussian filtering on the lattice: splat, blur, slice; and its symmetric normalisation."""

import sys
import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .lattice import Lattice, build_lattice


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
        if not products_are_fast(table.device):
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
        sums = table.new_empty(len(self.start) - 1, table.shape[1])
        return torch.addmm(sums, self.matrix, table, beta=0, out=sums)

    @cached_property
    def matrix(self) -> Shaped[Tensor, "groups rows"]:
        """The same as a sparse matrix, which shares these tensors."""
        size = (len(self.start) - 1, self.table_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.start, self.rows, self.weights, size, check_invariants=False
            )


@cache
def products_are_fast(device: torch.device) -> bool:
    """Whether a sparse product beats embedding bags.

    It does on a CPU with MKL's products, which PyTorch leaves out on Windows, and on a GPU, where bags
    leave most of a warp idle.
    """
    with_mkl = torch.backends.mkl.is_available() and sys.platform != "win32"
    return device.type == "cuda" or (device.type == "cpu" and with_mkl)


def blurs_by_products(device: torch.device, channels: int) -> bool:
    """Whether to blur by sparse products instead of by copies of the neighbours' values."""
    return device.type == "cpu" and products_are_fast(device) and channels > 1


def padded(device: torch.device, channels: int) -> int:
    """Channels to filter at once: MKL's product takes 4, 8, ... columns in half the time of 2 or 3."""
    return -(-channels // 4) * 4 if blurs_by_products(device, channels) else channels


@dataclass(frozen=True)
class LatticeFilter:
    """A linear map of values at n points: splat onto the lattice, blur there, slice back."""

    lattice: Lattice
    splat: GroupSums
    slice: GroupSums

    def __call__(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Filter c channels at once."""
        vertices = self.splat(values)
        if not blurs_by_products(vertices.device, vertices.shape[1]):
            return self.slice(blur(self.lattice, vertices))
        for step in self.blur_steps:
            vertices = step(vertices)
        return self.slice(vertices)

    @cached_property
    def blur_steps(self) -> tuple[GroupSums, ...]:
        """The blur along each direction."""
        return blur_sums(self.lattice)


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
    splatted = torch.bincount(lattice.vertex.view(-1), weights.view(-1), lattice.size)
    blurred = blur(lattice, splatted.to(weights.dtype)[:, None])
    return slice_sums(lattice, weights)(blurred).mul_(lattice.alpha)


def splat_sums(lattice: Lattice, weights: Float[Tensor, "classes n"]) -> GroupSums:
    """Sum the points' values on their vertices."""
    grouped = [
        of_class.index_select(0, points)
        for of_class, points in zip(weights, lattice.splat_point, strict=True)
    ]
    points = lattice.splat_point.view(-1)
    return GroupSums(lattice.splat_start, points, torch.cat(grouped), weights.shape[1])


def slice_sums(lattice: Lattice, weights: Float[Tensor, "n classes"]) -> GroupSums:
    """Read each point's value off its vertices."""
    n, classes = weights.shape
    start = torch.arange(0, n * classes + 1, classes, dtype=torch.int32, device=weights.device)
    return GroupSums(start, lattice.vertex.view(-1), weights.view(-1), lattice.size)


def blur(lattice: Lattice, values: Float[Tensor, "vertices_1 c"]) -> Float[Tensor, "vertices_1 c"]:
    """Convolve with [1/2, 1, 1/2] along each lattice direction in turn, in place."""
    for before, after in zip(lattice.before, lattice.after, strict=True):
        around = take_rows(values, before).add_(take_rows(values, after))
        values.add_(around, alpha=0.5)
    return values


def blur_sums(lattice: Lattice) -> tuple[GroupSums, ...]:
    """The steps of :func:`blur` as sums of three vertices each."""
    m, device = lattice.size, lattice.before.device
    each = torch.arange(m, dtype=torch.int32, device=device)
    start = torch.arange(0, 3 * m + 1, 3, dtype=torch.int32, device=device)
    weights = lattice.barycentric.new_tensor([0.5, 1, 0.5]).repeat(m)
    return tuple(
        GroupSums(start, torch.stack([before, each, after], dim=1).view(-1), weights, m)
        for before, after in zip(lattice.before, lattice.after, strict=True)
    )


def take_rows(values: Float[Tensor, "m c"], rows: Int[Tensor, " r"]) -> Float[Tensor, "r c"]:
    """values[rows]; a single column is copied faster as a list."""
    if values.shape[1] == 1:
        return values.view(-1).index_select(0, rows)[:, None]
    return values.index_select(0, rows)
