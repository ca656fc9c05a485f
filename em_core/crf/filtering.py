"""Gaussian filtering on the lattice: splat, blur, slice; and its symmetric normalisation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .lattice import Lattice, build_lattice

# Rows of 1, 2 or 4 floats can be copied as single elements, several times faster than as rows.
WIDE = {1: torch.float32, 2: torch.float64, 4: torch.complex128}


def lattice_filter(lattice: Lattice, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """K Q, approximately: K_ij = exp(-|f_i - f_j|^2 / 2), the term i = j included."""
    vertices = blur(lattice, splat(lattice, values))
    return slice_back(lattice, vertices)


def splat(lattice: Lattice, values: Float[Tensor, "n c"]) -> Float[Tensor, "vertices_1 c"]:
    """Sum the points' values onto their vertices; the extra vertex stays 0."""
    if values.device.type == "cuda":
        rows = len(lattice.splat_start) - 1
        matrix = torch.sparse_csr_tensor(
            lattice.splat_start,
            lattice.splat_point,
            lattice.splat_weight,
            size=(rows, len(values)),
            check_invariants=False,
        )
        return matrix @ values
    return F.embedding_bag(
        lattice.splat_point,
        values,
        lattice.splat_start,
        mode="sum",
        per_sample_weights=lattice.splat_weight,
        include_last_offset=True,
    )


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


def slice_back(lattice: Lattice, values: Float[Tensor, "vertices_1 c"]) -> Float[Tensor, "n c"]:
    """Read each point's value off its vertices."""
    if values.device.type == "cuda":
        corners = values[lattice.slice_vertex]
        return (corners * lattice.slice_weight[:, :, None]).sum(dim=1)
    return F.embedding_bag(
        lattice.slice_vertex, values, mode="sum", per_sample_weights=lattice.slice_weight
    )


@dataclass(frozen=True)
class NormalisedFilter:
    """D^-1/2 K D^-1/2 with D = diag(K 1), the normalisation and the weight folded into the tables.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011; symmetric normalisation as in their later code.
    """

    lattice: Lattice

    def __call__(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Filter c channels at once."""
        return lattice_filter(self.lattice, values)


def normalised_filter(features: Float[Tensor, "d n"]) -> NormalisedFilter:
    """Filter over n points with d features in units of its standard deviation.

    Raises:
        UserError: see :func:`build_lattice`.
    """
    lattice = build_lattice(features)
    alpha = 1 / (1 + 2.0**-lattice.dimension)
    lattice.slice_weight.mul_(alpha)
    row_sums = lattice_filter(lattice, features.new_ones(features.shape[1], 1))
    scale = (row_sums.view(-1).double() + 1e-20).rsqrt_().float()
    lattice.splat_weight.mul_(scale.index_select(0, lattice.splat_point))
    lattice.slice_weight.mul_(scale[:, None])
    return NormalisedFilter(lattice)
