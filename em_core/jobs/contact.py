"""Contact sheets of a batch: a small picture of each job, with its name and what came of it."""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..errors import UserError
from ..evaluate.contact import captioned
from ..pictures import open_image, save_image
from ..show.drawing import sheet
from .outputs import PREVIEW

ACROSS, DOWN, SIDE = 8, 12, 160


def write_sheets(root: Path, lines: Iterable[Mapping[str, Any]], end: str = "") -> list[Path]:
    """Write contact_1.png and so on, with 96 jobs each, and return the files.

    Args:
        root: the batch's folder.
        lines: of its index.
        end: what names have after "contact", for a part of a batch.
    """
    left = iter(lines)
    files: list[Path] = []
    while page := list(islice(left, ACROSS * DOWN)):
        images = [tile(root, line) for line in page]
        rows = {
            f"{row + 1 + len(files) * DOWN}": images[row * ACROSS : (row + 1) * ACROSS]
            for row in range(-(-len(images) // ACROSS))
        }
        files.append(root / f"contact{end}_{len(files) + 1}.png")
        save_image(files[-1], sheet(rows, side=SIDE))
    return files


def tile(root: Path, line: Mapping[str, Any]) -> Image.Image:
    """Return a job's picture with its name and IoU, or what is wrong with it."""
    if line["status"] == "done":
        try:
            return captioned(open_image(root / line["folder"] / PREVIEW), caption(line), SIDE)
        except UserError:
            pass  # a result that was taken away meanwhile has no picture
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    return captioned(written_on(canvas, line), caption(line), SIDE)


def written_on(canvas: Image.Image, line: Mapping[str, Any]) -> Image.Image:
    """Write a job's status and error on a white picture."""
    text = f"{line['status']}\n\n" + "\n".join(wrapped(line.get("error") or ""))
    ImageDraw.Draw(canvas).multiline_text((4, 4), text, fill="black")
    return canvas


def wrapped(text: str, width: int = 24, most: int = 7) -> list[str]:
    """Return a text in lines of this width."""
    return [text[at : at + width] for at in range(0, min(len(text), width * most), width)]


def caption(line: Mapping[str, Any]) -> str:
    """Return a job's name with its mean IoU, or with what was not found."""
    iou, missing = line.get("iou") or {}, line.get("missing") or {}
    more = ""
    if missing:
        more = f": no {', '.join(missing)}"
    elif iou:
        more = f": IoU {sum(iou.values()) / len(iou):.2f}"
    return f"{line['name']}{more}"[:26]
