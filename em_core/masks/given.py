"""Masks that come from elsewhere: what may be wrong with them is said before anything is learned."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from .guards import Guards
from .measures import areas

BORDER, MIDDLE = 0.9, 0.1


def looks_inverted(mask: Float[Tensor, "h w"]) -> bool:
    """Return whether a mask in 0..1 covers the border and not the middle, as inverted ones mostly do.

    It covers nine tenths of the outermost pixels, and at most a tenth of the middle half by each side.
    """
    height, width = mask.shape
    rim = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    middle = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return bool(rim.mean() >= BORDER and middle.mean() <= MIDDLE)


def inverted(masks: Sequence[Float[Tensor, "h w"]]) -> list[int]:
    """Return which masks of one picture, counted from 0, look inverted.

    One of several may: it is that of a background. Where it is the only mask, or one of several such, it
    is more likely to be an inverted one.
    """
    found = [index for index, mask in enumerate(masks) if looks_inverted(mask)]
    return found if len(found) > 1 or len(masks) == 1 else []


def parts(mask: Bool[Tensor, "h w"], least: float = Guards().min_area) -> Bool[Tensor, "n h w"]:
    """Return the separate parts of a mask, each as a mask, from left to right by their middle.

    Pixels that touch at a side or a corner belong together.

    Args:
        least: smallest share of the picture (0..1) that counts as a part; less is a speck and left out.
    """
    from scipy.ndimage import label  # slow to load

    numbers, count = label(mask.cpu().numpy(), structure=np.ones((3, 3)))
    found = [torch.from_numpy(numbers == number + 1) for number in range(count)]
    found = [part for part in found if float(areas(part)) >= least]
    found.sort(key=lambda part: float(part.nonzero()[:, 1].float().mean()))
    return torch.stack(found) if found else mask.cpu().new_zeros((0, *mask.shape))


def by_instance(mask: Bool[Tensor, "h w"], names: Sequence[str]) -> dict[str, Bool[Tensor, "h w"]]:
    """Return the parts of one mask that holds all concepts, by name: from left to right, in this order.

    Raises:
        UserError: it has another number of separate parts.
    """
    found = parts(mask)
    if len(found) != len(names):
        raise UserError(
            f"Bad number of masks. Expected {len(names)}, one for each of {', '.join(names)}, or one with as many "
            f"separate parts; got one with {len(found)}. Combine one for each with Batch Masks, in this order."
        )
    return dict(zip(names, found, strict=True))
