"""Refusing pictures whose lattice would not fit into memory, before it is built."""

import os

import torch

from ...errors import UserError

BYTES_PER_PIXEL = 700
ASSUMED_MEMORY = 8 << 30


def require_memory(pixels: int, device: torch.device) -> None:
    """Raise a UserError if a CRF over that many pixels needs more memory than the device has.

    `BYTES_PER_PIXEL` is what building a large photograph's lattice was measured to take at its peak;
    the masks themselves come on top.
    """
    need, have = pixels * BYTES_PER_PIXEL, total_memory(device)
    if need > have:
        raise UserError(
            f"The CRF of {pixels} pixels needs up to {need / 2**30:.1f} GB of memory, "
            f"{device.type} has {have / 2**30:.1f} GB. Set a working size (--working-size), such as 512."
        )


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device; 8 GB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ASSUMED_MEMORY
