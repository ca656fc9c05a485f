"""Where the demo world's objects stand, how large they are and how they are turned."""

from collections.abc import Sequence
from math import radians

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import Generator

from .captions import Look
from .rendering import SIZE, SceneObject

# Centres of two objects are at least this share of their radii's sum apart: hardly any pixel of
# one hides the other, or parts of both may overlap.
APART, CLOSE = 0.93, 0.6


def place(
    looks: Sequence[Look], rng: Generator, radius: tuple[float, float], near: float = APART
) -> tuple[SceneObject, ...]:
    """Put objects into a picture, not nearer than `near` allows; from left to right."""
    while True:
        radii = rng.uniform(*radius, len(looks))
        margin = radii[:, None] * 0.95
        centres = margin + rng.random((len(looks), 2)) * (SIZE - 2 * margin)
        far = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        too_near = far < near * (radii[:, None] + radii[None])
        if not too_near[~np.eye(len(looks), dtype=bool)].any():
            break
    order = np.argsort(centres[:, 0])
    return tuple(_object(looks[i], centres[i], float(radii[i]), rng) for i in order)


def _object(look: Look, centre: Float[ndarray, "2"], radius: float, rng: Generator) -> SceneObject:
    red, green, blue = (int(value) for value in rng.integers(-9, 10, 3))
    across, down = (float(value) for value in rng.uniform(0, 14, 2))
    turn, lay = (float(value) for value in rng.uniform(-1, 1, 2))
    return SceneObject(
        *look,
        x=float(centre[0]),
        y=float(centre[1]),
        radius=radius,
        angle=radians(12) * turn,
        pattern_angle=radians(90) * lay,
        phase=(across, down),
        tint=(red, green, blue),
    )
