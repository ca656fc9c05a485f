"""Strips of pictures under their masks: colours that stay, legends, sizes."""

import torch
from PIL import Image
from torch import Tensor

from em_core.show.drawing import COLOURS
from em_core.show.strip import MOST, Strip, over_curves
from em_core.show.words import say_time

GREY = torch.full((3, 64, 48), 0.5)


def square(top: int, left: int) -> Tensor:
    mask = torch.zeros(64, 48, dtype=torch.bool)
    mask[top : top + 16, left : left + 16] = True
    return mask


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """Pixels of exactly this colour: outlines and the legend's swatches."""
    return sum(n for n, found in image.getcolors(image.width * image.height) if found == colour)


def test_a_concept_keeps_its_colour_in_every_picture() -> None:
    """The second picture names the second concept alone, and the swatch has its colour too."""
    strip = Strip.of([GREY, GREY], ("rex", "doll"))
    swatches = strip.draw([{}, {}])
    assert count(swatches, COLOURS[0]) == count(swatches, COLOURS[1]) > 0
    drawn = strip.draw([{}, {"doll": square(8, 8)}])
    assert count(drawn, COLOURS[1]) > count(swatches, COLOURS[1])
    assert count(drawn, COLOURS[0]) == count(swatches, COLOURS[0])
    assert drawn.size == swatches.size


def test_masks_lie_where_they_are() -> None:
    """Of any size of their own: an outline is where the mask is, scaled to what is shown."""
    strip = Strip.of([GREY], ("rex",))
    height, width = strip.pictures[0].shape[-2:]
    drawn = strip.draw([{"rex": square(16, 8)[::2, ::2]}])
    outlined = drawn.crop((6, 0, 6 + width, height))
    pixels = [
        (x, y)
        for x in range(width)
        for y in range(height)
        if outlined.getpixel((x, y)) == COLOURS[0]
    ]
    xs, ys = zip(*pixels, strict=True)
    scale = width / 48
    for found, wanted in zip((min(xs), max(xs), min(ys), max(ys)), (8, 24, 16, 32), strict=True):
        assert abs(found - wanted * scale) <= 2


def test_many_pictures_and_long_names_stay_on_it() -> None:
    names = tuple(f"a_rather_long_name_{n}" for n in range(9))
    few, many = Strip.of([GREY] * 4, names), Strip.of([GREY] * (MOST + 5), names)
    assert len(many.pictures) == MOST and many.left_out == 5
    assert many.draw([{}] * (MOST + 5)).width == few.draw([{}] * 4).width


def test_what_was_not_found_is_said() -> None:
    strip = Strip.of([GREY], ("rex", "doll"))
    nothing = torch.zeros(64, 48, dtype=torch.bool)
    told = strip.entries([{"rex": square(0, 0), "doll": nothing}])
    assert [entry.text for entry in told] == ["rex", "doll: nothing found"]
    assert [entry.text for entry in strip.entries([{}])] == ["rex", "doll"]


def test_strip_and_curves_are_one_picture() -> None:
    strip, curves = Image.new("RGB", (500, 250), "red"), Image.new("RGB", (1680, 400), "white")
    both = over_curves(strip, curves)
    assert both.size == (1000, 500 + 238)
    assert both.getpixel((500, 498)) == (255, 0, 0)
    assert both.getpixel((500, 502)) == (255, 255, 255)


def test_times_in_words() -> None:
    said = [
        say_time(seconds) for seconds in (0.2, 40.0, 59.6, 61.0, 200.0, 3599.0, 4800.0, 36000.0)
    ]
    assert said == [
        "1 s",
        "40 s",
        "60 s",
        "1 min",
        "3 min",
        "1 h 0 min",
        "1 h 20 min",
        "10 h 0 min",
    ]
