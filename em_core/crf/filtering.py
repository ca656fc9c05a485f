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
class LatticeFilter:
    """A linear map of values at n points: splat onto the lattice, blur there, slice back.

    Attributes:
        lattice: the tables.
        splat_weight: of each entry of `lattice.splat_point`.
        slice_weight: of each entry of `lattice.slice_vertex`.
    """

    lattice: Lattice
    splat_weight: Float[Tensor, "classes n"]
    slice_weight: Float[Tensor, "n classes"]

    def __call__(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Filter c channels at once."""
        return slice_back(self.lattice, self.slice_weight, blur(self.lattice, self.splat(values)))

    def splat(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "vertices_1 c"]:
        """Sum the points' values on their vertices; the missing vertex gets 0."""
        lattice = self.lattice
        if bags_are_fast(values.device):
            points, weights = lattice.splat_point.view(-1), self.splat_weight.view(-1)
            groups = gather_sum(values, points, weights, lattice.splat_start)
        else:
            groups = (self.splat_matrix @ values).contiguous()
        return take_rows(groups, lattice.splat_group)

    @cached_property
    def splat_matrix(self) -> Shaped[Tensor, "groups n"]:
        """The splat onto groups as a sparse matrix."""
        start, size = self.lattice.splat_start, len(self.slice_weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                start,
                self.lattice.splat_point.view(-1),
                self.splat_weight.view(-1),
                (len(start) - 1, size),
                check_invariants=False,
            )


def bags_are_fast(device: torch.device) -> bool:
    """Whether to gather by embedding bags. On a GPU they leave most of a warp idle at few channels."""
    return device.type != "cuda"


def plain_filter(lattice: Lattice) -> LatticeFilter:
    """K of K_ij = exp(-|f_i - f_j|^2 / 2), approximately; the term i = j is included."""
    alpha = 1 / (1 + 2.0**-lattice.dimension)
    return LatticeFilter(
        lattice, by_vertex(lattice, lattice.slice_weight), lattice.slice_weight * alpha
    )


def normalised_filter(features: Float[Tensor, "d n"]) -> LatticeFilter:
    """D^-1/2 K D^-1/2 with D = diag(K 1), over points with features in units of K's deviation.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011; the symmetric normalisation is that of their later code.

    Raises:
        UserError: see :func:`build_lattice`.
    """
    lattice = build_lattice(features)
    alpha = 1 / (1 + 2.0**-lattice.dimension)
    scaled = lattice.slice_weight * row_sums(lattice, alpha).rsqrt()
    return LatticeFilter(lattice, by_vertex(lattice, scaled), scaled.mul_(alpha))


def row_sums(lattice: Lattice, alpha: float) -> Float[Tensor, "n 1"]:
    """K 1. The splat of ones is a histogram, so it needs no weights by vertex."""
    vertices, weights = lattice.slice_vertex, lattice.slice_weight
    splatted = torch.bincount(vertices.view(-1), weights.view(-1), len(lattice.splat_start) - 1)
    blurred = blur(lattice, splatted.to(weights.dtype)[:, None])
    return slice_back(lattice, weights * alpha, blurred)


def by_vertex(lattice: Lattice, weights: Float[Tensor, "n classes"]) -> Float[Tensor, "classes n"]:
    """Weights of the points' vertices in the order of `lattice.splat_point`."""
    classes = zip(weights.unbind(1), lattice.splat_point, strict=True)
    return torch.stack([column.index_select(0, points) for column, points in classes])


def blur(lattice: Lattice, values: Float[Tensor, "vertices_1 c"]) -> Float[Tensor, "vertices_1 c"]:
    """Convolve with [1/2, 1, 1/2] along each lattice direction in turn, in place."""
    for before, after in zip(lattice.before, lattice.after, strict=True):
        around = take_rows(values, before)
        around += take_rows(values, after)
        values.add_(around, alpha=0.5)
    return values


def slice_back(
    lattice: Lattice, weights: Float[Tensor, "n classes"], values: Float[Tensor, "vertices_1 c"]
) -> Float[Tensor, "n c"]:
    """Read each point's value off its vertices."""
    vertices = lattice.slice_vertex
    if not bags_are_fast(values.device):
        return (values[vertices] * weights[:, :, None]).sum(dim=1)
    return gather_sum(values, vertices.view(-1), weights.view(-1), lattice.slice_start)


def gather_sum(
    values: Float[Tensor, "m c"],
    rows: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    start: Int[Tensor, " groups_1"],
) -> Float[Tensor, "groups c"]:
    """Weighted sum of rows of `values` for each group; `start` ends with the number of entries."""
    return F.embedding_bag(
        rows, values, start, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def take_rows(values: Float[Tensor, "m c"], rows: Int[Tensor, " r"]) -> Float[Tensor, "r c"]:
    """values[rows]"""
    wide = WIDE.get(values.shape[1])
    if wide is None:
        return values.index_select(0, rows)
    taken = values.view(wide).view(-1).index_select(0, rows)
    return taken.view(torch.float32).view(len(rows), -1)
