"""Whether a noisy curve still falls, on curves of which that is known."""

import numpy as np
import pytest

from em_core.show.trend import still_falls

SEEDS = range(100)


def curve(
    steps: int, before: float, after: float, seed: int, variation: float = 0.5
) -> list[float]:
    """A loss that falls to `before` in the first half and from there to `after`, with noise like that of
    diffusion losses: log-normal, with a standard deviation of `variation` times the mean."""
    g, x = np.random.default_rng(seed), np.arange(steps) / steps
    falling = np.interp(x, [0.0, 0.3, 0.5, 1.0], [2 * before, before, before, after])
    sigma = np.sqrt(np.log(1 + variation**2))
    return list(falling * np.exp(sigma * g.standard_normal(steps) - sigma**2 / 2))


def said(steps: int, before: float, after: float) -> float:
    """The share of such curves that are said to fall."""
    return float(np.mean([still_falls(curve(steps, before, after, seed)) for seed in SEEDS]))


@pytest.mark.parametrize("steps", [60, 120, 400, 2000])
def test_a_settled_curve_is_not_said_to_fall(steps: int) -> None:
    """The level is one in a hundred; of a hundred curves, five would be said by one in two hundred such tests.
    A rise is none either."""
    assert said(steps, 0.2, 0.2) <= 0.04
    assert said(steps, 0.2, 0.3) == 0


@pytest.mark.parametrize(("steps", "after"), [(60, 0.02), (120, 0.06), (400, 0.08), (2000, 0.14)])
def test_a_falling_curve_is_said_to_fall(steps: int, after: float) -> None:
    """From 0.2: the more steps, the smaller the fall that shows."""
    assert said(steps, 0.2, after) >= 0.95


def test_without_noise() -> None:
    """A fall of less than a twentieth does not matter; of few steps nothing can be said."""
    line = [float(x) for x in np.linspace(1.0, 0.5, 100)]
    assert still_falls(line) is True
    assert still_falls(list(reversed(line))) is False
    assert still_falls([1 - 0.0005 * step for step in range(100)]) is False
    assert still_falls([1.0] * 100) is False
    assert still_falls(line[:39]) is None and still_falls([]) is None


def test_what_was_long_ago_does_not_count() -> None:
    """A curve that fell in its first half alone has settled."""
    assert still_falls([*np.linspace(9, 1, 100), *[1.0, 1.01] * 50]) is False
