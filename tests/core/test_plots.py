"""Plots of curves: where their points lie, which numbers stand at the axes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from em_core.show.drawing import COLOURS
from em_core.show.plots import DRAWN_AT, HEIGHT, WIDTH, Panel, draw_curves, plot_curves, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 400, [0, 100, 200, 300, 400]),
        (1, 12, [5, 10]),
        (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]),
        (0, 3e-7, [0, 1e-7, 2e-7, 3e-7]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(
    low: float, high: float, expected: list[float]
) -> None:
    np.testing.assert_allclose(ticks(float(low), float(high)), expected, atol=1e-9 * (high - low))


def test_points_lie_where_their_numbers_say() -> None:
    """Each concept has its colour at its points, the first the first colour, as its mask has."""
    curves = {"iou/rex": ((0, 0.25), (10, 0.5)), "iou/doll": ((0, 0.75), (10, 1.0))}
    picture = np.asarray(draw_curves(curves)).astype(int)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    panel = Panel.around("iou", curves, 0)
    for points, colour in zip(curves.values(), COLOURS, strict=False):
        for step, value in points:
            x, y = (round(place / DRAWN_AT) for place in panel.at(step, value))
            near = np.abs(picture[y - 1 : y + 2, x - 1 : x + 2] - colour).sum(-1)
            assert near.min() < 30, (step, value)
    assert panel.at(0, 0.5)[1] == (panel.at(0, 0.0)[1] + panel.at(0, 1.0)[1]) / 2


def test_a_third_panel_lies_below() -> None:
    curves = {"iou/rex": ((0, 0.5),), "area/rex": ((0, 0.5),), "loss/total": ((1, 2.0), (9, 2.0))}
    picture = np.asarray(draw_curves(curves)).astype(int)
    assert picture.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    panel = Panel.around("loss", {"total": curves["loss/total"]}, 0, HEIGHT)
    x, y = (round(place / DRAWN_AT) for place in panel.at(5, 2.0))
    assert y > HEIGHT and np.abs(picture[y - 1 : y + 2, x] - COLOURS[0]).sum(-1).min() < 60
    assert (picture[HEIGHT:, WIDTH:] == 255).all()


def test_losses_are_drawn_smoothed_and_from_zero() -> None:
    noisy = tuple((step, 1.0 + (step % 2)) for step in range(1, 101))
    picture = np.asarray(draw_curves({"loss/total": noisy})).astype(int)
    panel = Panel.around("loss", {"total": noisy}, 0)
    assert panel.y == (0.0, 2.0)
    x, y = (round(place / DRAWN_AT) for place in panel.at(80, 1.5))
    strong = np.abs(picture[:, x] - COLOURS[0]).sum(-1) < 60
    assert strong[y - 4 : y + 5].any() and not strong[: y - 8].any()


@pytest.mark.parametrize(
    ("curves", "panels"),
    [
        ({}, 1),
        ({"loss/total": ()}, 1),
        ({"joint_loss/total": ((1, 0.2),)}, 1),
        ({"loss/total": ((1, 0.5), (2, 0.5)), "area/rex": ((0, 0.1),), "other/x": ((0, 1.0),)}, 2),
    ],
)
def test_few_points_and_none(tmp_path: Path, curves: dict, panels: int) -> None:
    plot_curves(curves, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (panels * WIDTH, HEIGHT)
