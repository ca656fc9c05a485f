"""A check, before the lattice is built, that it will fit into memory."""

import os

import torch

from ...errors import UserError

BYTES_PER_PIXEL = 700
ASSUMED_MEMORY = 8 << 30


def require_memory(pixels: int, device: torch.device) -> None:
    """Raise a UserError if a CRF over this many pixels needs more memory than the device has.

    `BYTES_PER_PIXEL` is the peak measured while building the lattice of a large photograph. The
    masks themselves need memory beyond that.
    """
    need, have = pixels * BYTES_PER_PIXEL, total_memory(device)
    if need > have:
        raise UserError(
            f"A CRF over {pixels} pixels needs up to {need / 2**30:.1f} GB of memory, but "
            f"{device.type} has {have / 2**30:.1f} GB. Set a working size (--working-size), such as 512."
        )


def total_memory(device: torch.device) -> int:
    """Bytes of memory in the device; 8 GB are assumed if the system does not report its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ASSUMED_MEMORY
