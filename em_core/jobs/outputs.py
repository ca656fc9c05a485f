"""Files that several commands and jobs write alike."""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from ..examples import NamedMasks
from ..masks.resizing import Size, cut, resize
from ..pictures import Picture, save_image, save_mask, to_image
from ..show.drawing import overlay

PREVIEW, SIDE = "preview.png", 256


def mask_file(name: str, number: int | None = None) -> str:
    """Return the name of a concept's mask; a number of its picture follows, where there are several."""
    return f"mask_{name}.png" if number is None else f"mask_{name}_{number}.png"


def save_masks(
    out: Path, masks: NamedMasks, size: Size, number: int | None = None
) -> dict[str, Bool[Tensor, "H W"]]:
    """Write `mask_<concept>.png` at the size of the masks' picture, and return them at that size.

    Args:
        out: the folder.
        masks: concept -> mask of any size.
        size: height and width of the picture.
        number: of the picture, which follows the concept's name; None if there is one alone.
    """
    if not masks:
        return {}
    stack = torch.stack([mask.float().cpu() for mask in masks.values()])
    large = dict(zip(masks, cut(resize(stack, size, "mask")), strict=True))
    for name, mask in large.items():
        save_mask(out / mask_file(name, number), mask)
    return large


def save_preview(out: Path, picture: Picture, masks: Mapping[str, Tensor]) -> None:
    """Write a small picture with its masks tinted, for a contact sheet."""
    shown = to_image(picture)
    if masks:
        shown = overlay(picture, torch.stack(list(masks.values())))
    save_small(out, shown)


def save_small(out: Path, image: Image.Image) -> None:
    """Write a picture for a contact sheet."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    save_image(out / PREVIEW, image)
