"""The one way to resize each kind of image, and the one way to turn masks into labels."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Size = tuple[int, int]
"""Height and width."""


def resize(
    image: Float[Tensor, "*b _h _w"], size: Size, what: Literal["picture", "map", "mask"]
) -> Float[Tensor, "*b h w"]:
    """Resize an image by the rule for its kind; one of the right size is returned as it is.

    - Pictures in 0..1: antialiased bicubic, clamped to 0..1.
    - Attention maps and masks: area means along the sides that shrink, so that each pixel holds the
      share of it that is covered; bilinear along the sides that grow.
    """
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    flat = image.reshape(1, -1, height, width)
    if what == "picture":
        flat = F.interpolate(flat, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    else:
        smaller = min(height, size[0]), min(width, size[1])
        if smaller != (height, width):
            flat = F.interpolate(flat, size=smaller, mode="area")
        if smaller != size:
            flat = F.interpolate(flat, size=size, mode="bilinear")
    return flat.reshape(*image.shape[:-2], *size)


def cut(masks: Float[Tensor, "*b h w"]) -> Bool[Tensor, "*b h w"]:
    """Turn masks in 0..1 into labels: the pixels that are more than half covered."""
    return masks > 0.5
