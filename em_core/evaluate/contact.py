"""A contact sheet: the best and the worst pictures, with what they were ordered by."""

from collections.abc import Callable

from PIL import Image, ImageDraw

from ..pictures import to_image
from ..show.drawing import sheet
from .evaluation import Evaluation, PictureScores
from .summary import Order, rankings

MOST = 6
CAPTION = 14
PictureOf = Callable[[int, int], Image.Image]
"""From the number of a prompt, from 0, and a seed."""


def contact_sheet(evaluation: Evaluation, picture_of: PictureOf, most: int = MOST) -> Image.Image:
    """Lay out the best and the worst pictures by each order, and a reference of each concept.

    Under each picture stand its prompt's number, its seed, and the value it is ordered by.
    """
    rows = {}
    if evaluation.references:
        own = [(to_image(of[0]), name) for name, of in evaluation.references.items()]
        rows["learned from"] = [captioned(image, name) for image, name in own]

    def shown(scores: PictureScores, more: str = "") -> Image.Image:
        text = f"{scores.prompt + 1}, seed {scores.seed}{more}"
        return captioned(picture_of(scores.prompt, scores.seed), text)

    orders = rankings(evaluation)
    for title, order in orders.items():
        best, worst = extremes(order, most)
        for row, some in ((f"best {title}", best), (f"worst {title}", worst)):
            rows[row] = [shown(scores, f": {value:.3f}") for scores, value in some]
    if not orders:
        rows["pictures"] = [shown(scores) for scores in evaluation.pictures[:most]]
    return sheet({title: images for title, images in rows.items() if images})


def extremes(order: Order, most: int) -> tuple[Order, Order]:
    """Return the first and the last of an order, the very first and the very last first; none is in both."""
    count = min(most, (len(order) + 1) // 2)
    return order[:count], order[: count - 1 : -1][:most]


def captioned(image: Image.Image, text: str, side: int = 160) -> Image.Image:
    """Return an image with a line under it, square so that a sheet leaves it as it is."""
    room, image = side - CAPTION, image.convert("RGB")
    image.thumbnail((room, room), Image.Resampling.LANCZOS)
    if scale := room // max(image.size) - 1:  # a small picture keeps its pixels
        size = image.width * (scale + 1), image.height * (scale + 1)
        image = image.resize(size, Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, 0))
    ImageDraw.Draw(canvas).text((2, image.height + 1), text, fill="black")
    return canvas
