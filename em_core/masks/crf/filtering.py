"""Gaussian filtering on the lattice (splat, blur, slice) and its symmetric normalisation."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .lattice import Lattice, build_lattice
from .paths import FilterPath, choose_path

FIXED_POINT = 2.0**30


@dataclass(frozen=True)
class GroupSums:
    """Weighted sums of a table's rows, one per group of entries; in effect, a sparse matrix.

    Attributes:
        start: index of each group's first entry, followed by the number of entries.
        rows: the table row that each entry refers to.
        weights: the weight of each entry.
        table_size: number of rows in the table.
    """

    start: Int[Tensor, " groups_1"]
    rows: Int[Tensor, " entries"]
    weights: Float[Tensor, " entries"]
    table_size: int

    def __call__(
        self, table: Float[Tensor, "rows c"], path: FilterPath
    ) -> Float[Tensor, "groups c"]:
        """Sum the rows of each group."""
        if path.sums == "bag":
            return F.embedding_bag(
                self.rows,
                table,
                self.start,
                mode="sum",
                per_sample_weights=self.weights,
                include_last_offset=True,
            )
        if path.columns == 1:
            return torch.mv(self.matrix, table.view(-1))[:, None]
        sums = table.new_empty(len(self.start) - 1, table.shape[1])
        return torch.addmm(sums, self.matrix, table, beta=0, out=sums)

    @cached_property
    def matrix(self) -> Shaped[Tensor, "groups rows"]:
        """The sums as a sparse matrix that shares memory with these tensors."""
        size = (len(self.start) - 1, self.table_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            # torch 2.11 says so of whoever leaves the checks out, asked for or not.
            warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly")
            return torch.sparse_csr_tensor(
                self.start, self.rows, self.weights, size, check_invariants=False
            )


@dataclass(frozen=True)
class LatticeFilter:
    """A linear map of values at n points: splat onto the lattice, blur there, slice back."""

    lattice: Lattice
    splat: GroupSums
    slice: GroupSums

    def __call__(
        self, values: Float[Tensor, "n c"], path: FilterPath | None = None
    ) -> Float[Tensor, "n c"]:
        """Filter c channels at once.

        Args:
            values: one row per point.
            path: how to compute it. The values must then have exactly the path's columns. By
                default, the fastest path is chosen and the values are padded as it requires.
        """
        if path is None:
            channels = values.shape[1]
            path = choose_path(values.device, channels)
            return self(F.pad(values, (0, path.columns - channels)), path)[:, :channels]
        vertices = self.splat(values, path)
        if path.blur == "copies":
            vertices = blur_by_copies(self.lattice, vertices, path)
        else:
            for step in self.blur_steps:
                vertices = step(vertices, path)
        return self.slice(vertices, path)

    @cached_property
    def blur_steps(self) -> tuple[GroupSums, ...]:
        """The blur along each direction, as sums."""
        return blur_sums(self.lattice)


def normalised_filter(features: Float[Tensor, "d n"]) -> LatticeFilter:
    """Filter by D^-1/2 K D^-1/2, where K_ij = exp(-|f_i - f_j|^2 / 2) and D = diag(K 1).

    The lattice approximates K. The terms i = j are included.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011; the symmetric normalisation is that of their later code.

    Args:
        features: f, in units of the kernel's standard deviation.

    Raises:
        UserError: see :func:`build_lattice`.
    """
    lattice = build_lattice(features)
    weights = lattice.barycentric.t().contiguous()
    scale = row_sums(lattice, weights, choose_path(features.device, 1)).rsqrt_()
    splat = splat_sums(lattice, lattice.barycentric * scale.t())
    return LatticeFilter(lattice, splat, slice_sums(lattice, weights.mul_(scale * lattice.alpha)))


def row_sums(
    lattice: Lattice, weights: Float[Tensor, "n classes"], path: FilterPath
) -> Float[Tensor, "n 1"]:
    """K 1, from the barycentric weights, by a path of one column.

    The splat of ones is a histogram of the vertices. The blur is always by copies, since the tables
    for sums would be used only once.
    """
    vertex, flat = lattice.vertex.view(-1), weights.view(-1)
    if weights.device.type == "cuda":
        splatted = histogram(vertex, flat, lattice.size)
    else:
        splatted = torch.bincount(vertex, flat, lattice.size).to(weights.dtype)
    blurred = blur_by_copies(lattice, splatted[:, None], path)
    return slice_sums(lattice, weights)(blurred, path).mul_(lattice.alpha)


def histogram(
    index: Int[Tensor, " entries"], weights: Float[Tensor, " entries"], size: int
) -> Float[Tensor, " size"]:
    """Sum weights of 0..1 by their index, the same sums every time.

    A GPU adds in no fixed order, which changes floating-point sums from run to run, but not those of
    integers.
    """
    fixed = (weights * FIXED_POINT).round_().to(torch.int64)
    sums = torch.zeros(size, dtype=torch.int64, device=weights.device)
    sums.scatter_add_(0, index.to(torch.int64), fixed)
    return sums.to(weights.dtype) / FIXED_POINT


def splat_sums(lattice: Lattice, weights: Float[Tensor, "classes n"]) -> GroupSums:
    """The sums that add up the points' values at their vertices."""
    grouped = [
        class_weights.index_select(0, points)
        for class_weights, points in zip(weights, lattice.splat_point, strict=True)
    ]
    points = lattice.splat_point.view(-1)
    return GroupSums(lattice.splat_start, points, torch.cat(grouped), weights.shape[1])


def slice_sums(lattice: Lattice, weights: Float[Tensor, "n classes"]) -> GroupSums:
    """The sums that interpolate each point's value from its vertices."""
    n, classes = weights.shape
    start = torch.arange(0, n * classes + 1, classes, dtype=torch.int32, device=weights.device)
    return GroupSums(start, lattice.vertex.view(-1), weights.view(-1), lattice.size)


def blur_by_copies(
    lattice: Lattice, values: Float[Tensor, "vertices_1 c"], path: FilterPath
) -> Float[Tensor, "vertices_1 c"]:
    """Convolve with [1/2, 1, 1/2] along each lattice direction in turn, in place."""
    table = values.view(-1) if path.columns == 1 else values
    for before, after in zip(lattice.before, lattice.after, strict=True):
        around = table.index_select(0, before).add_(table.index_select(0, after))
        table.add_(around, alpha=0.5)
    return values


def blur_sums(lattice: Lattice) -> tuple[GroupSums, ...]:
    """The same convolutions as sums of three vertices each, one :class:`GroupSums` per direction."""
    m, device = lattice.size, lattice.before.device
    itself = torch.arange(m, dtype=torch.int32, device=device)
    start = torch.arange(0, 3 * m + 1, 3, dtype=torch.int32, device=device)
    weights = lattice.barycentric.new_tensor([0.5, 1, 0.5]).repeat(m)
    return tuple(
        GroupSums(start, torch.stack([before, itself, after], dim=1).view(-1), weights, m)
        for before, after in zip(lattice.before, lattice.after, strict=True)
    )
