"""Strips of pictures under their masks, with a legend: what is shown while a run lasts, and of its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..examples import NamedMasks
from ..masks.resizing import Size, resize
from ..pictures import Picture
from .drawing import COLOURS, paint

MOST, ACROSS = 12, 4
SIDES = {1: 420, 2: 320}
SIDE = 220
"""Longer side of each picture, in pixels, by how many there are."""
GAP, LINE, SWATCH, OUTLINE = 6, 24, 14, 2
FINISHED = 1000
BACKGROUND, TEXT, FAINT = (24, 24, 24), (235, 235, 235), (150, 150, 150)


@dataclass(frozen=True)
class Strip:
    """Pictures of a run, scaled to be shown over and over under changing masks.

    Attributes:
        pictures: [3, h, w] each, in 0..1, at the size that they are shown at.
        names: of all concepts; each has its colour by its place here, in every picture.
        left_out: how many further pictures there are.
    """

    pictures: tuple[Picture, ...]
    names: tuple[str, ...]
    left_out: int = 0

    @classmethod
    def of(cls, pictures: Sequence[Picture], names: Sequence[str]) -> "Strip":
        """Scale pictures of any size; the first twelve are shown."""
        shown = pictures[:MOST]
        side = SIDES.get(len(shown), SIDE)
        small = tuple(resize(p.detach().cpu(), fitting(p, side), "picture") for p in shown)
        return cls(small, tuple(names), len(pictures) - len(shown))

    def draw(self, masks: Sequence[NamedMasks], caption: str = "") -> Image.Image:
        """Draw the pictures under their masks, the caption over them and the legend below.

        Args:
            masks: of each picture, concept -> mask of any size.
            caption: one line; "" for none.
        """
        tiles = [self.tile(p, m) for p, m in zip(self.pictures, masks, strict=False)]
        rows = [tiles[i : i + ACROSS] for i in range(0, len(tiles), ACROSS)]
        width = max(sum(t.width + GAP for t in row) for row in rows) + GAP
        legend = flowed(self.entries(masks), width - 2 * GAP)
        top = LINE if caption else 0
        height = top + sum(max(t.height for t in row) + GAP for row in rows) + LINE * len(legend)
        canvas = Image.new("RGB", (width, height + GAP), BACKGROUND)
        pen = ImageDraw.Draw(canvas)
        if caption:
            pen.text((GAP, LINE / 2), caption, TEXT, font(), anchor="lm")
        below = top
        for row in rows:
            left = GAP
            for tile in row:
                canvas.paste(tile, (left, below))
                left += tile.width + GAP
            below += max(t.height for t in row) + GAP
        for number, line in enumerate(legend):
            draw_line(pen, line, below + LINE * number)
        return canvas

    def tile(self, picture: Picture, masks: NamedMasks) -> Image.Image:
        """Draw one picture under its masks."""
        size = (picture.shape[-2], picture.shape[-1])
        coloured = [
            (COLOURS[self.names.index(name) % len(COLOURS)], at_size(mask, size))
            for name, mask in masks.items()
        ]
        return paint(picture, coloured, OUTLINE)

    def entries(self, masks: Sequence[NamedMasks]) -> list["Entry"]:
        """What the legend says: each concept, and which of them has empty masks alone."""
        pairs = [(name, bool(mask.any())) for of in masks for name, mask in of.items()]
        empty = {name for name, _ in pairs} - {name for name, some in pairs if some}
        named = [
            Entry(f"{name}: nothing found" if name in empty else name, COLOURS[i % len(COLOURS)])
            for i, name in enumerate(self.names)
        ]
        more = [Entry(f"and {self.left_out} more pictures", None)] if self.left_out else []
        return [*named, *more]


@dataclass(frozen=True)
class Entry:
    """A word of the legend, with its colour if it is a concept."""

    text: str
    colour: tuple[int, int, int] | None

    @property
    def width(self) -> float:
        return float(font().getlength(self.text)) + (SWATCH + GAP if self.colour else 0) + 2 * GAP


def over_curves(strip: Image.Image, curves: Image.Image) -> Image.Image:
    """Put a strip over a plot of curves, both at one width, to be looked at as one picture."""
    parts = [scaled(image, FINISHED) for image in (strip, curves)]
    canvas = Image.new("RGB", (FINISHED, sum(part.height for part in parts)), BACKGROUND)
    canvas.paste(parts[0], (0, 0))
    canvas.paste(parts[1], (0, parts[0].height))
    return canvas


def scaled(image: Image.Image, width: int) -> Image.Image:
    """Scale an image to a width."""
    height = max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def fitting(picture: Picture, side: int) -> Size:
    """The size with `side` pixels on the longer side."""
    height, width = picture.shape[-2:]
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def at_size(mask: Bool[Tensor, "_h _w"], size: Size) -> Bool[Tensor, "h w"]:
    """A mask [h, w] at another size, its edges hard."""
    shown = F.interpolate(mask[None, None].float(), size, mode="nearest")
    return shown[0, 0].cpu() > 0.5


def flowed(entries: Sequence[Entry], width: int) -> list[list[Entry]]:
    """Break the entries into lines of at most this width, with at least one entry each."""
    lines: list[list[Entry]] = []
    for entry in entries:
        if lines and sum(each.width for each in [*lines[-1], entry]) <= width:
            lines[-1].append(entry)
        else:
            lines.append([entry])
    return lines


def draw_line(pen: ImageDraw.ImageDraw, line: Sequence[Entry], top: int) -> None:
    """Draw a line of the legend."""
    left, middle = float(GAP), top + LINE / 2
    for entry in line:
        at = left
        if entry.colour:
            box = [at, middle - SWATCH / 2, at + SWATCH, middle + SWATCH / 2]
            pen.rectangle(box, fill=entry.colour)
            at += SWATCH + GAP
        pen.text((at, middle), entry.text, TEXT if entry.colour else FAINT, font(), anchor="lm")
        left += entry.width


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(14)
