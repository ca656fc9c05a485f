"""Pictures on disk: reading, with every quirk handled or refused, and writing."""

import os
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import UserError
from .files import write_aside

Picture = Float[Tensor, "3 H W"]
MAX_PIXELS = 64_000_000
DARK = 0.1  # what a black picture may have of light after compression, as a share of white


def open_image(path: Path | str) -> Image.Image:
    """Open and decode an image, rotated as its EXIF data says.

    Raises:
        UserError: the file does not exist, is not an image, is damaged, or is larger than 64 megapixels.
    """
    if not os.path.isfile(path):
        raise UserError(f"No file {path}. Expected a picture (PNG, JPEG, WebP).")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path} has {image.width}x{image.height} pixels. Expected at most 64 million. "
                    "Make it smaller."
                )
            return ImageOps.exif_transpose(image)
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a readable picture ({error}). Save it again as PNG or JPEG."
        ) from error


def read_picture(path: Path | str) -> Float[Tensor, "3 H W"]:
    """Read a picture as RGB in 0..1.

    Alpha is composited over white; 16-bit and floating-point greys keep their full range.

    Raises:
        UserError: it has values that are not finite; or see :func:`open_image`.
    """
    image = open_image(path)
    if is_deep(image):
        grey = deep_values(image, path)
        grey /= np.float32(full_range(grey) if image.mode == "F" else 65535)
        return torch.from_numpy(np.repeat(grey.clip(0, 1)[None], 3, axis=0))
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return from_image(image)


def read_mask(path: Path | str) -> Bool[Tensor, "H W"]:
    """Read a mask: where the picture is opaque, or where it is light if it is opaque throughout.

    Opaque is an alpha over half of its range, and light a luminance over half of its own, which is up to
    1 if no value is larger, otherwise that of 8 or 16 bits. Alpha counts only where it tells parts of
    the picture apart, not where all of it is opaque, or none.

    Raises:
        UserError: it has values that are not finite, or is neither black nor light anywhere; or see
            :func:`open_image`.
    """
    image = open_image(path)
    if has_alpha(image):
        opaque = np.asarray(image.convert("RGBA"))[..., 3] > 127
        if opaque.any() and not opaque.all():
            return torch.from_numpy(opaque)
        image = image.convert("RGBA")
    if is_deep(image):
        light = deep_values(image, path)
    else:
        light = np.asarray((image if image.mode in "1L" else image.convert("RGB")).convert("L"))
    white, lightest = full_range(light), light.max()
    if DARK * white < lightest <= white / 2:
        raise UserError(
            f"{path} has no light part: its lightest value is {lightest:g} of {white}. Expected a mask that is "
            "white where the concept is and black elsewhere, or transparent elsewhere."
        )
    return torch.from_numpy(light > white / 2)


def is_deep(image: Image.Image) -> bool:
    """Return whether an image has greys of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def has_alpha(image: Image.Image) -> bool:
    """Return whether an image can be transparent."""
    return "A" in image.getbands() or "transparency" in image.info


def deep_values(image: Image.Image, path: Path | str) -> Float[np.ndarray, "h w"]:
    """Return greys of 16 or 32 bits as they are in the file.

    Raises:
        UserError: there are values that are not finite.
    """
    values = np.array(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            f"{path} has values that are not finite (NaN or infinite). Expected greys from 0 to 1, 255 or "
            "65535. Save it again."
        )
    return values


def full_range(values: Shaped[np.ndarray, "h w"]) -> int:
    """Return the value of white, judged by the largest value: 1, or the maximum of 8 or 16 bits."""
    largest = values.max()
    return 1 if largest <= 1 else 255 if largest <= 255 else 65535


def from_image(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Convert a Pillow image to RGB in 0..1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels.copy()), "h w c -> c h w")


def to_image(picture: Shaped[Tensor, "c H W"]) -> Image.Image:
    """Convert an RGB or grey tensor in 0..1 to a Pillow image."""
    pixels = (picture.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else rearrange(pixels, "c h w -> h w c"))


def save_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, in full or not at all."""
    write_aside(path, lambda aside: image.save(aside, format="PNG"))


def save_mask(path: Path, mask: Bool[Tensor, "H W"]) -> None:
    """Write a mask as a black and white PNG, in full or not at all."""
    save_image(path, to_image(mask[None].float()))
