"""Masks that come from elsewhere: what may be wrong with them is said before anything is learned."""

import torch
from jaxtyping import Float
from torch import Tensor

BORDER, MIDDLE = 0.9, 0.1


def looks_inverted(mask: Float[Tensor, "h w"]) -> bool:
    """Return whether a mask in 0..1 covers the border and not the middle, as inverted ones mostly do.

    It covers nine tenths of the outermost pixels, and at most a tenth of the middle half by each side.
    """
    height, width = mask.shape
    rim = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    middle = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return bool(rim.mean() >= BORDER and middle.mean() <= MIDDLE)
