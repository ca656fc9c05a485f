"""Photographs with masks, which are not part of the project: four folders with img.jpg and mask*.png.

They are looked for where VISUAL_CONCEPTS_PHOTOS points, or in ../shared/data/photos beside the
repository.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from em_core.masks.resizing import cut, resize
from em_core.pictures import from_image, open_image, read_mask

NAMES = ("bear", "birds", "creature", "toys")


def folder() -> Path:
    beside = Path(__file__).parents[3] / "shared" / "data" / "photos"
    return Path(os.environ.get("VISUAL_CONCEPTS_PHOTOS", beside))


needed = pytest.mark.skipif(
    not all((folder() / name / "img.jpg").is_file() for name in NAMES),
    reason=f"no photos in {folder()}; set VISUAL_CONCEPTS_PHOTOS",
)


def read_photo(name: str, size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """The picture at (height, width), and `count` binary masks: the photo's, then shifted copies."""
    height, width = size
    image = from_image(open_image(folder() / name / "img.jpg").resize((width, height)))
    files = sorted((folder() / name).glob("mask*.png"))
    given = torch.stack([read_mask(f).float() for f in files])
    masks = cut(resize(given, size, "mask")).float()
    shifted = torch.roll(masks, (height // 5, width // 7), dims=(1, 2))
    return image, torch.cat([masks, shifted])[:count]
