"""Plots of a run's curves, drawn with Pillow so that they need nothing that a run does not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..method.state import Curves
from ..pictures import save_image
from .drawing import COLOURS

PANELS = (
    ("iou", "mask IoU"),
    ("area", "mask area (share of the picture)"),
    ("loss", "loss"),
    ("joint_loss", "joint loss"),
    ("visual_loss", "loss of the visual condition"),
)
SHARES = ("iou", "area")
SMOOTHING = 15
WIDTH, HEIGHT = 560, 400
COLUMNS = 2
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46
DRAWN_AT = 2
"""Everything is drawn this many times as large, then shrunk: Pillow's lines have hard edges."""
BLACK, GREY, LIGHT = (30, 30, 30), (110, 110, 110), (228, 228, 228)
Points = Sequence[tuple[int, float]]
Colour = tuple[int, int, int]


def plot_curves(curves: Curves, path: Path) -> None:
    """Write a PNG with one panel each for IoU, areas and losses, leaving out those without curves.

    Raises:
        UserError: the file cannot be written.
    """
    save_image(path, draw_curves(curves))


def draw_curves(curves: Curves) -> Image.Image:
    """Draw what :func:`plot_curves` writes: two panels side by side, further ones below."""
    panels = [(kind, title, of_kind(curves, kind)) for kind, title in PANELS]
    panels = [(kind, title, lines) for kind, title, lines in panels if lines]
    columns = min(COLUMNS, max(1, len(panels)))
    size = WIDTH * columns, HEIGHT * max(1, math.ceil(len(panels) / columns))
    canvas = Image.new("RGB", (size[0] * DRAWN_AT, size[1] * DRAWN_AT), "white")
    for index, (kind, title, lines) in enumerate(panels):
        left, top = index % columns * WIDTH, index // columns * HEIGHT
        Panel.around(kind, lines, left, top).draw(ImageDraw.Draw(canvas), title, lines)
    return canvas.resize(size, Image.Resampling.LANCZOS)


def of_kind(curves: Curves, kind: str) -> dict[str, Points]:
    """The curves of one panel, under their names without the kind."""
    names = [name for name in curves if name.startswith(kind + "/") and curves[name]]
    return {name.partition("/")[2]: curves[name] for name in names}


@dataclass(frozen=True)
class Panel:
    """One plot: what its axes reach, and where it lies.

    Attributes:
        kind: of the curves.
        x, y: (lowest, highest) value of each axis.
        left, top: its left and upper edge in the finished picture's pixels.
    """

    kind: str
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 0
    top: int = 0

    @classmethod
    def around(cls, kind: str, lines: Mapping[str, Points], left: int = 0, top: int = 0) -> "Panel":
        """The panel that holds all points; shares of the picture go from 0 to 1."""
        steps, values = zip(*(point for points in lines.values() for point in points), strict=True)
        y = (0.0, 1.0) if kind in SHARES else (min(0.0, *values), max(values))
        return cls(kind, widened(float(min(steps)), float(max(steps))), widened(*y), left, top)

    def at(self, step: int | float, value: float) -> tuple[float, float]:
        """Where a point lies, in pixels of the drawing; values beyond the axis lie on its end."""
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = min(1.0, max(0.0, (value - self.y[0]) / (self.y[1] - self.y[0])))
        x = self.left + LEFT + across * (WIDTH - LEFT - RIGHT)
        y = self.top + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return x * DRAWN_AT, y * DRAWN_AT

    def draw(self, pen: ImageDraw.ImageDraw, title: str, lines: Mapping[str, Points]) -> None:
        """Draw axes, curves and legend."""
        self.draw_axes(pen, title)
        for index, points in enumerate(lines.values()):
            self.draw_line(pen, points, COLOURS[index % len(COLOURS)])
        self.draw_legend(pen, list(lines))

    def draw_axes(self, pen: ImageDraw.ImageDraw, title: str) -> None:
        """Draw the title, the ticks with their numbers, and the frame."""
        small, large = font(12), font(14)
        for value in ticks(*self.y):
            pen.line([self.at(self.x[0], value), self.at(self.x[1], value)], LIGHT, DRAWN_AT)
            x, y = self.at(self.x[0], value)
            pen.text((x - 6 * DRAWN_AT, y), f"{value:.4g}", GREY, small, anchor="rm")
        for value in ticks(*self.x):
            x, y = self.at(value, self.y[0])
            pen.line([(x, y), self.at(value, self.y[1])], LIGHT, DRAWN_AT)
            pen.text((x, y + 6 * DRAWN_AT), f"{value:.6g}", GREY, small, anchor="mt")
        low, high = self.at(self.x[0], self.y[0]), self.at(self.x[1], self.y[1])
        pen.rectangle([low[0], high[1], high[0], low[1]], outline=GREY, width=DRAWN_AT)
        middle = (low[0] + high[0]) / 2
        pen.text((middle, (self.top + 10) * DRAWN_AT), title, BLACK, large, anchor="mt")
        pen.text((middle, (self.top + HEIGHT - 8) * DRAWN_AT), "step", BLACK, small, anchor="mb")

    def draw_line(self, pen: ImageDraw.ImageDraw, points: Points, colour: Colour) -> None:
        """Draw one curve; losses pale, with their running mean over them."""
        steps, values = zip(*points, strict=True)
        spots = [self.at(*point) for point in points]
        if self.kind not in SHARES:
            pale = tuple(round(255 - 0.3 * (255 - part)) for part in colour)
            pen.line(spots, pale, DRAWN_AT, joint="curve")
            spots = [self.at(*point) for point in zip(steps, running_mean(values), strict=True)]
        if self.kind in SHARES or len(spots) == 1:
            for x, y in spots:
                pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
        pen.line(spots, colour, 2 * DRAWN_AT, joint="curve")

    def draw_legend(self, pen: ImageDraw.ImageDraw, names: Sequence[str]) -> None:
        """Name the curves, in a corner where few of them pass."""
        text = font(12)
        width = max(pen.textlength(name, text) for name in names) + 34 * DRAWN_AT
        right, top = self.at(self.x[1], self.y[1])
        if self.kind == "iou":
            top = self.at(0, self.y[0])[1] - (18 * len(names) + 16) * DRAWN_AT
        left, top = right - width - 8 * DRAWN_AT, top + 8 * DRAWN_AT
        bottom = top + (18 * len(names) + 6) * DRAWN_AT
        pen.rectangle([left, top, left + width, bottom], fill=(255, 255, 255), outline=LIGHT)
        for index, name in enumerate(names):
            y = top + (12 + 18 * index) * DRAWN_AT
            colour = COLOURS[index % len(COLOURS)]
            pen.line([(left + 6 * DRAWN_AT, y), (left + 22 * DRAWN_AT, y)], colour, 3 * DRAWN_AT)
            pen.text((left + 28 * DRAWN_AT, y), name, BLACK, text, anchor="lm")


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font at the drawing's scale."""
    return ImageFont.load_default(size * DRAWN_AT)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range of some width: one number becomes the middle of a range."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, some `about` of them: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low, high: ends of the axis, low < high.
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def running_mean(values: Sequence[float], width: int = SMOOTHING) -> list[float]:
    """Average each value with up to `width` - 1 values before it."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    return [
        (total[end] - total[max(0, end - width)]) / min(width, end)
        for end in range(1, len(values) + 1)
    ]
