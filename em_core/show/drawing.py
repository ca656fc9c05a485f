"""Pictures of masks: overlays and labelled sheets."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..pictures import to_image

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart.
COLOURS = (
    (213, 94, 0),
    (86, 180, 233),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (230, 159, 0),
)


Colour = tuple[int, int, int]


def overlay(
    picture: Float[Tensor, "3 H W"], masks: Bool[Tensor, "k H W"], scale: int = 1
) -> Image.Image:
    """Dim the picture, then tint and outline each mask in its own colour."""
    coloured = [(COLOURS[i % len(COLOURS)], mask) for i, mask in enumerate(masks.cpu())]
    image = paint(picture, coloured)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def paint(
    picture: Float[Tensor, "3 H W"],
    masks: Sequence[tuple[Colour, Bool[Tensor, "H W"]]],
    width: int = 1,
) -> Image.Image:
    """Dim the picture, then tint and outline each mask in the colour that comes with it.

    Args:
        width: of the outlines, in pixels.
    """
    picture = picture.detach().cpu()
    shown = picture * 0.55
    for colour, mask in masks:
        tint = torch.tensor(colour)[:, None] / 255
        shown[:, mask] = 0.6 * picture[:, mask] + 0.4 * tint
        shown[:, outline(mask, width)] = tint
    return to_image(shown)


def outline(mask: Bool[Tensor, "H W"], width: int = 1) -> Bool[Tensor, "H W"]:
    """Return the pixels of the mask that are within `width` pixels of its outside."""
    padded = torch.nn.functional.pad(mask[None, None].float(), [width] * 4, mode="replicate")
    inner = -torch.nn.functional.max_pool2d(-padded, 2 * width + 1, stride=1)[0, 0] > 0.5
    return mask & ~inner


def sheet(
    rows: Mapping[str, Sequence[Image.Image]], columns: Sequence[str] = (), side: int = 160
) -> Image.Image:
    """Lay images out in a labelled grid: one row per entry, with titles over the columns."""
    written = [line for title in rows for line in title.splitlines()]
    label = 7 * max(map(len, written), default=0) + 14
    count = max(len(images) for images in rows.values())
    canvas = Image.new("RGB", (label + count * (side + 4), 22 + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(columns):
        pen.text((label + column * (side + 4) + 2, 5), title, fill="black")
    for row, (title, images) in enumerate(rows.items()):
        top = 22 + row * (side + 4)
        height = 12 * (title.count("\n") + 1)
        pen.text((6, top + (side - height) // 2), title, fill="black")
        for column, image in enumerate(images):
            fit = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.NEAREST)
            canvas.paste(fit, (label + column * (side + 4), top))
    return canvas
