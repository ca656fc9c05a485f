"""How sure a mask is of each pixel, from the map that it was made from."""

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from ..resizing import cut


def confident_masks(
    masks: Float[Tensor, "k h w"], maps: Float[Tensor, "k h w"]
) -> Float[Tensor, "k h w"]:
    """Grade masks by their maps: 1/2 at the threshold, 1 where a map is 1, 0 where it is 0.

    In between it is linear. A mask's threshold is the smallest value that its map has inside it. Which
    side of 1/2 a pixel is on is left to the mask, whatever it was that took the pixel away or gave it.

    Args:
        masks: in 0..1, of which the pixels over 1/2 count.
        maps: in 0..1.
    """
    inside = cut(masks)
    lowest = reduce(maps.where(inside, torch.ones_like(maps)), "k h w -> k", "min")
    tau = rearrange(lowest.clamp(1e-3, 1 - 1e-3), "k -> k 1 1")
    below, above = maps / (2 * tau), (1 + (maps - tau) / (1 - tau)) / 2
    return torch.where(inside, above.clamp(0.5, 1), below.clamp(0, 0.5))
