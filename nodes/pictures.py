"""Conversions between ComfyUI's IMAGE and MASK and the core's tensors."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.masks.resizing import Size, cut, resize
from ..em_core.pictures import Picture, from_image


def pictures_of(image: Float[Tensor, "b h w c"]) -> list[Picture]:
    """Return the pictures of an IMAGE as RGB in 0..1, with alpha composited over white.

    Raises:
        UserError: the IMAGE holds no picture, or values that are not finite.
    """
    if image.ndim != 4 or image.shape[0] == 0 or image.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"Bad IMAGE. Expected pictures with 1, 3 or 4 channels, got shape {tuple(image.shape)}. "
            "Check the node it comes from."
        )
    if not torch.isfinite(image).all():
        raise UserError(
            "The IMAGE contains values that are not finite. Check the node it comes from."
        )
    image = image.detach().clone().float().cpu().clamp(0, 1)
    if image.shape[-1] == 4:
        colour, alpha = image[..., :3], image[..., 3:]
        image = colour * alpha + (1 - alpha)
    image = image.expand(-1, -1, -1, 3)
    return [picture.contiguous() for picture in rearrange(image, "b h w c -> b c h w")]


def masks_of(mask: Float[Tensor, "*b h w"]) -> Float[Tensor, "n h w"]:
    """Return the masks of a MASK as one stack in 0..1.

    Raises:
        UserError: the MASK holds values that are not finite.
    """
    if not torch.isfinite(mask).all():
        raise UserError(
            "The MASK contains values that are not finite. Check the node it comes from."
        )
    mask = mask.detach().clone().float().cpu().clamp(0, 1)
    return mask.reshape(-1, *mask.shape[-2:])


def labels_of(masks: Float[Tensor, "n _h _w"], size: Size) -> Bool[Tensor, "n h w"]:
    """Resize masks to `size` and cut them into labels."""
    return cut(resize(masks, size, "mask"))


def to_mask(stacks: Sequence[Tensor]) -> Float[Tensor, "n h w"]:
    """Join stacks of masks into one MASK, all resized to the size of the first."""
    height, width = stacks[0].shape[-2:]
    resized = [resize(stack.float(), (height, width), "mask") for stack in stacks]
    return torch.cat(resized).cpu().clone()


def to_images(images: Sequence[Image.Image]) -> Float[Tensor, "n h w 3"]:
    """Join Pillow images of one size into an IMAGE."""
    return rearrange(torch.stack([from_image(image) for image in images]), "n c h w -> n h w c")
