"""Integer keys of lattice vertices: within a class, cell coordinates are mixed-radix digits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import mul

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...errors import UserError
from .embedding import Simplices, chunks


@dataclass(frozen=True)
class Numbering:
    """How the coordinates of a cell form a vertex's key.

    Attributes:
        low: the coordinates that become digit 0.
        strides: how much a key grows by one step along each coordinate.
        span: number of possible keys in a class. In a list shared by all classes, the keys of class
            r start at r * span.
    """

    low: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    @property
    def class_dtype(self) -> torch.dtype:
        """Integer type for the keys of one class."""
        return torch.int32 if self.span < 2**31 else torch.int64

    @property
    def shared_dtype(self) -> torch.dtype:
        """Integer type for the doubled keys of all classes."""
        return torch.int32 if 2 * self.span * (len(self.strides) + 1) < 2**31 else torch.int64


def number_cells(cell: Float[Tensor, "d n"]) -> Numbering:
    """A numbering with room for all corners of the cells and the neighbours of those corners.

    Raises:
        UserError: 64-bit keys do not suffice.
    """
    lowest, highest = cell.amin(dim=1).tolist(), cell.amax(dim=1).tolist()
    extent = [high - low for low, high in zip(lowest, highest, strict=True)]
    cells = math.prod(size + 5 for size in extent)
    if not 2 * cells * (len(extent) + 1) < 2**63:
        raise UserError(
            "The CRF's thetas are too small for this picture. Expected a lattice of less than 1e+17 "
            f"cells, got {cells:.0e}. Use larger thetas."
        )
    sizes = [int(size) + 5 for size in extent]
    strides = tuple(accumulate(reversed(sizes[1:]), mul, initial=1))[::-1]
    return Numbering(tuple(int(low) - 2 for low in lowest), strides, math.prod(sizes))


def keys_by_class(simplices: Simplices, numbering: Numbering) -> Iterator[Int[Tensor, " n"]]:
    """Keys of all simplices' corners of class 0, then of class 1, and so on.

    The corner of class r lies one step below the cell along each of the r coordinates with the
    highest rank numbers. By how much that lowers the key is looked up in a table of all subsets of
    coordinates.
    """
    d = len(simplices.cell)
    cells = chunked(simplices.cell, lambda cell: cell_keys(cell, numbering))
    steps = subset_steps(numbering, cells.device)
    yield cells
    for r in range(1, d + 1):
        chosen = chunked(simplices.rank, partial(subset, above=d - r))
        yield cells - steps.index_select(0, chosen)


def chunked(
    rows: Shaped[Tensor, "d n"], function: Callable[[Tensor], Tensor]
) -> Shaped[Tensor, " n"]:
    """Apply the function to chunks of columns and concatenate the results."""
    return torch.cat([function(rows[:, part]) for part in chunks(rows)])


def cell_keys(cell: Float[Tensor, "d n"], numbering: Numbering) -> Int[Tensor, " n"]:
    """Keys of the corners of class 0."""
    total = torch.zeros_like(cell[0], dtype=numbering.class_dtype)
    for row, low, stride in zip(cell, numbering.low, numbering.strides, strict=True):
        total += (row - low).to(total.dtype) * stride
    return total


def subset(rank: Shaped[Tensor, "d n"], above: int) -> Int[Tensor, " n"]:
    """The set of coordinates ranked greater than `above`, as a bit mask."""
    bits = (rank[0] > above).view(torch.int8)
    for i in range(1, len(rank)):
        bits = bits | ((rank[i] > above).view(torch.int8) << i)
    return bits.to(torch.int32)


def subset_steps(numbering: Numbering, device: torch.device) -> Int[Tensor, " subsets"]:
    """The sum of strides for each subset of coordinates, indexed by bit mask."""
    steps = [0]
    for stride in numbering.strides:
        steps += [step + stride for step in steps]
    return torch.tensor(steps, dtype=numbering.class_dtype, device=device)
