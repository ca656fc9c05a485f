"""Pictures and masks for the CRF's benchmarks, and the files that they write."""

import os
import secrets
from pathlib import Path

import torch
from torch import Tensor

from em_core.masks.resizing import cut, resize
from em_core.pictures import from_image, open_image, read_mask

RESULTS = Path(__file__).parent / "results"
BESIDE = Path(__file__).parents[2] / "shared" / "data" / "photos"


def photo_folders() -> list[Path]:
    """Folders with img.jpg and mask*.png, in VISUAL_CONCEPTS_PHOTOS or else beside the repository."""
    root = Path(os.environ.get("VISUAL_CONCEPTS_PHOTOS", BESIDE))
    folders = sorted(file.parent for file in root.glob("*/img.jpg"))
    if not folders:
        raise SystemExit(f"No photos in {root}. Expected <name>/img.jpg with <name>/mask*.png.")
    return folders


def read_photo(folder: Path, side: int) -> tuple[Tensor, Tensor]:
    """The picture, 0..1, and its masks, 0 or 1, at side x side."""
    image = from_image(open_image(folder / "img.jpg").resize((side, side)))
    masks = torch.stack([read_mask(file).float() for file in sorted(folder.glob("mask*.png"))])
    return image, cut(resize(masks, (side, side), "mask")).float()


def first_masks(masks: Tensor, count: int) -> Tensor:
    """The first `count` of the photo's masks, followed by shifted copies of them."""
    shifted = torch.roll(masks, (masks.shape[1] // 5, masks.shape[2] // 7), dims=(1, 2))
    return torch.cat([masks, shifted])[:count]


def write(name: str, text: str) -> None:
    """Write a file to the results folder, either completely or not at all."""
    RESULTS.mkdir(exist_ok=True)
    aside = RESULTS / f".{secrets.token_hex(4)}"
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, RESULTS / name)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
