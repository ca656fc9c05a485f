"""Lattice vertices as integers: within a remainder class, a cell's coordinates are mixed digits."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...errors import UserError
from .embedding import Simplices, chunks


@dataclass(frozen=True)
class Numbering:
    """Digits of a vertex's key.

    Attributes:
        low: least digit of each coordinate.
        strides: value of a step along each coordinate.
        span: keys of one class; class r's begin at r * span where classes share one list.
    """

    low: tuple[int, ...]
    strides: tuple[int, ...]
    span: int

    @property
    def class_dtype(self) -> torch.dtype:
        """Type that holds the keys of one class."""
        return torch.int32 if self.span < 2**31 else torch.int64

    @property
    def shared_dtype(self) -> torch.dtype:
        """Type that holds twice the keys of all classes."""
        return torch.int32 if 2 * self.span * (len(self.strides) + 1) < 2**31 else torch.int64


def number_cells(cell: Float[Tensor, "d n"]) -> Numbering:
    """Numbering with room for every corner of the cells and for those corners' neighbours.

    Raises:
        UserError: keys of 64 bits do not suffice.
    """
    least, most = cell.amin(dim=1).tolist(), cell.amax(dim=1).tolist()
    extent = [high - low for low, high in zip(least, most, strict=True)]
    cells = math.prod(size + 5 for size in extent)
    if not 2 * cells * (len(extent) + 1) < 2**63:
        raise UserError(
            "The CRF's thetas are too small for this picture. Expected a lattice of under 1e+17 "
            f"cells, got {cells:.0e}. Use larger thetas."
        )
    sizes = [int(size) + 5 for size in extent]
    strides = tuple(accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1]
    return Numbering(tuple(int(low) - 2 for low in least), strides, math.prod(sizes))


def keys_by_class(simplices: Simplices, numbering: Numbering) -> Iterator[Int[Tensor, " n"]]:
    """Keys of the corner of class 0 of every simplex, then of class 1, and so on.

    Corner r is the cell less one along each of the r coordinates of highest rank; a table of all
    subsets of coordinates gives the step down from the cell's key.
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
    """The function's results over chunks of columns, joined."""
    return torch.cat([function(rows[:, part]) for part in chunks(rows)])


def cell_keys(cell: Float[Tensor, "d n"], numbering: Numbering) -> Int[Tensor, " n"]:
    """Keys of class-0 corners."""
    total = torch.zeros_like(cell[0], dtype=numbering.class_dtype)
    for row, low, stride in zip(cell, numbering.low, numbering.strides, strict=True):
        total += (row - low).to(total.dtype) * stride
    return total


def subset(rank: Shaped[Tensor, "d n"], above: int) -> Int[Tensor, " n"]:
    """Bit i of the result tells whether coordinate i has a rank over `above`."""
    bits = (rank[0] > above).view(torch.int8)
    for i in range(1, len(rank)):
        bits = bits | ((rank[i] > above).view(torch.int8) << i)
    return bits.to(torch.int32)


def subset_steps(numbering: Numbering, device: torch.device) -> Int[Tensor, " subsets"]:
    """Sum of the strides of each subset of coordinates."""
    steps = [0]
    for stride in numbering.strides:
        steps += [step + stride for step in steps]
    return torch.tensor(steps, dtype=numbering.class_dtype, device=device)
