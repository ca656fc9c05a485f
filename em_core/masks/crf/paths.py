"""The choice of operations that compute a filter, by device and number of channels."""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

MKL_COLUMNS = 4


@dataclass(frozen=True)
class FilterPath:
    """One way to compute a filter and the mean field around it; all agree within rounding.

    Attributes:
        columns: columns of the tables that are filtered; those beyond the channels are padding. A
            single column is handled as a vector.
        sums: weighted sums of a table's rows by a sparse matrix "product" or an embedding "bag".
        blur: along each direction, "sums" of the three vertices involved, computed as all sums are,
            or "copies" of both neighbours' values, which are then added.
        label_totals: sums over the labels by a "product" with a matrix of ones or a "reduction".
    """

    columns: int
    sums: Literal["product", "bag"]
    blur: Literal["sums", "copies"]
    label_totals: Literal["product", "reduction"]


def choose_path(device: torch.device, channels: int) -> FilterPath:
    """The fastest known path for so many channels at once on the device that gives the same every time."""
    if device.type != "cpu":
        # On CUDA a sparse product takes a half to four fifths of the time, but adds in no fixed order. Others
        # were not measured; bags and copies are the operations that are supported most widely.
        return FilterPath(channels, sums="bag", blur="copies", label_totals="reduction")
    # On a CPU, reducing rows of a few columns is slower than a small dense product.
    if not has_mkl_products():
        return FilterPath(channels, sums="bag", blur="copies", label_totals="product")
    if channels == 1:
        # MKL's product beats a bag, but it does not beat copying the neighbours' values in a vector.
        return FilterPath(1, sums="product", blur="copies", label_totals="product")
    # MKL's product of 4 columns was measured to take half the time of 2 or 3 on one processor and
    # that of 3 on another. At 4 columns, sums beat copies in the blur.
    columns = -(-channels // MKL_COLUMNS) * MKL_COLUMNS
    return FilterPath(columns, sums="product", blur="sums", label_totals="product")


def has_mkl_products() -> bool:
    """Whether PyTorch multiplies sparse matrices with MKL on the CPU; on Windows it never does."""
    return torch.backends.mkl.is_available() and sys.platform != "win32"
