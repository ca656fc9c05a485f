"""Resizing of pictures, maps and masks."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]
"""Height and width."""


def resize_picture(
    picture: Float[Tensor, "3 _h _w"], size: tuple[int, int]
) -> Float[Tensor, "3 h w"]:
    """Antialiased bicubic resize, values kept in 0..1."""
    if tuple(picture.shape[-2:]) == size:
        return picture
    resized = F.interpolate(
        picture[None], size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].clamp(0, 1)


def resize_maps(
    maps: Float[Tensor, "b k _h _w"], size: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Bilinear resize; area averaging where it shrinks."""
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] > size[0]:
        return F.interpolate(maps, size=size, mode="area")
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def resize_masks(
    masks: Float[Tensor, "k _h _w"], size: tuple[int, int], *, soft: bool = True
) -> Float[Tensor, "k h w"]:
    """Area resize where it shrinks, bilinear where it grows; `soft=False` then cuts at 0.5."""
    if masks.shape[-2:] != size:
        mode = "area" if masks.shape[-2] >= size[0] and masks.shape[-1] >= size[1] else "bilinear"
        align = None if mode == "area" else False
        masks = F.interpolate(masks[None].float(), size=size, mode=mode, align_corners=align)[0]
    return masks if soft else (masks > 0.5).float()
