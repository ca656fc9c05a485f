"""Concepts cut out of pictures by their masks, on black as Break-a-Scene compares them."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from ..pictures import Picture


def masked_crop(picture: Picture, mask: Bool[Tensor, "H W"]) -> Float[Tensor, "3 s s"]:
    """Cut a concept out of a picture.

    What lies outside the mask is black, and the mask's bounding box is padded with black to a square,
    so that an encoder that crops to a square loses nothing and one that squashes distorts nothing.

    Args:
        picture: [3, H, W], RGB in 0..1.
        mask: where the concept is.

    Raises:
        UserError: the mask is empty.
    """
    if not bool(mask.any()):
        raise UserError("The mask of a concept is empty. Expected at least one pixel to cut out.")
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    crop = (picture * mask)[:, top:bottom, left:right]
    height, width = bottom - top, right - left
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    around = (before, side - width - before, above, side - height - above)
    return F.pad(crop, around)
