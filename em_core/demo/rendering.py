"""How the demo world's objects are drawn, and which of their pixels are seen.

A scene is rendered at three times its size and averaged down; an object's mask holds the visible
pixels that it covers by more than half, and no other pixel of the background is touched.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

from . import shapes, textures

SIZE = textures.SIZE
_FINE = 3


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and where; lengths in pixels, `angle` in radians."""

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    pattern_angle: float
    phase: tuple[float, float]
    tint: tuple[int, int, int]


def render(
    objects: tuple[SceneObject, ...], ground: Float[ndarray, "64 64 3"]
) -> tuple[UInt8[ndarray, "64 64 3"], Bool[ndarray, "n 64 64"]]:
    """Draw objects, later ones in front, on a background of values 0 to 255."""
    picture = ground.copy()
    masks = np.zeros((len(objects), SIZE, SIZE), dtype=bool)
    for index, each in enumerate(objects):
        window, colour, cover = _paint(each)
        alpha = np.clip(2 * cover - 1, 0, 1)[..., None]
        picture[window] += alpha * (colour - picture[window])
        masks[(slice(None), *window)] &= cover <= 0.5
        masks[(index, *window)] = cover > 0.5
    return textures.to_uint8(picture), masks


def _paint(
    each: SceneObject,
) -> tuple[tuple[slice, slice], Float[ndarray, "h w 3"], Float[ndarray, "h w"]]:
    """Window of the canvas, colour there (0 to 255), and how much of each pixel is covered."""
    reach = 1.25 * each.radius + 1
    left, top = max(0, int(each.x - reach)), max(0, int(each.y - reach))
    right, bottom = min(SIZE, int(each.x + reach) + 1), min(SIZE, int(each.y + reach) + 1)
    inside, edge = _stencil(each, left, top, right - left, bottom - top)
    x = (np.arange(inside.shape[1], dtype=np.float32) + 0.5) / _FINE + (left - each.x)
    y = (np.arange(inside.shape[0], dtype=np.float32) + 0.5) / _FINE + (top - each.y)
    colours = textures.COLOURS | textures.NEW_COLOURS
    main = np.asarray(colours[each.colour], dtype=np.float32) + np.asarray(each.tint)
    second = np.asarray(textures.marking(each.colour), dtype=np.float32)
    marked = textures.pattern_mask(each.pattern, *np.meshgrid(x, y), each.pattern_angle, each.phase)
    share = _shrink(inside & ~edge & marked) if marked is not None else np.zeros(1)
    line = _shrink(edge)
    cover = _shrink(inside)
    total = np.maximum(cover, 1e-6)
    outline = _outline_colour(main)
    colour = main + (share / total)[..., None] * (second - main)
    colour = colour + (line / total)[..., None] * (outline - main)
    return (slice(top, bottom), slice(left, right)), colour.astype(np.float32), cover


def _outline_colour(main: Float[ndarray, "3"]) -> Float[ndarray, "3"]:
    return main * 0.6


def _stencil(
    each: SceneObject, left: int, top: int, width: int, height: int
) -> tuple[Bool[ndarray, "h w"], Bool[ndarray, "h w"]]:
    """Inside of the shape and the part of it that is its outline, on the fine grid."""
    size = (width * _FINE, height * _FINE)
    centre = ((each.x - left) * _FINE - 0.5, (each.y - top) * _FINE - 0.5)
    fill, line = Image.new("1", size), Image.new("1", size)
    brush, pen = ImageDraw.Draw(fill), ImageDraw.Draw(line)
    added, cut = shapes.OUTLINES[each.shape]
    for polygons, value in ((added, 1), (cut, 0)):
        for polygon in polygons:
            points = shapes.placed(polygon, each.radius * _FINE, each.angle, centre)
            brush.polygon(points, fill=value)
            if len(added) == 1 or value == 0:
                pen.line([*points, *points[:2]], fill=1, width=5)
    inside = np.asarray(fill)
    return inside, np.asarray(line) & inside


def _shrink(fine: Bool[ndarray, "fh fw"]) -> Float[ndarray, "h w"]:
    height, width = fine.shape[0] // _FINE, fine.shape[1] // _FINE
    blocks = fine.reshape(height, _FINE, width, _FINE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)
