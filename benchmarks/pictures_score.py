"""What a picture is worth: its things against those that its prompt asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray
from ruler import BACKGROUNDS, Reading, Thing
from scipy.optimize import linear_sum_assignment

from em_core.demo.captions import Look
from em_core.demo.rendering import SIZE

PARTS = ("shape", "colour", "pattern")


NEAR = SIZE / 8
"""Pixels within which a thing stands where the learned picture has it."""
Spot = tuple[float, float]


@dataclass(frozen=True)
class Wanted:
    """What a prompt asks for.

    Attributes:
        looks: of its things.
        background: its background.
        places: where the picture that was learned from has those of its things that it shows.
        ground: that picture's background.
    """

    looks: tuple[Look, ...]
    background: str
    places: Mapping[Look, Spot] = field(default_factory=dict)
    ground: str = ""


def judge(reading: Reading, wanted: Wanted) -> dict[str, float]:
    """Judge a picture by what the ruler reads in it. Values are 0 to 1, means over the wanted things:

    - `shape`, `colour`, `pattern`: whether the most probable one is right; `soft_...`: the probability of
      the right one. A thing that is not there has 0.
    - `once`: there is a thing with at least two of the three right, and no other like it.
    - `all_once`: all wanted things are there once, and nothing else.
    - `mixing`: some thing has one wanted thing's shape, and another one's colour or pattern.
    - `extra`: there are more things than wanted ones. `background`: it is the right one.
    - `same_place`: share of the things learned that stand where the learned picture has them; `same_ground`:
      another background was asked for, and the learned picture's came.
    - `score`: sum of the wanted things' mean soft values, divided by the number of things, wanted or
      seen, whichever is larger.
    """
    soft = resemblances(reading.things, wanted.looks)
    values = np.zeros((len(wanted.looks), 3))
    right = np.zeros((len(wanted.looks), 3))
    near = dict.fromkeys(wanted.places.keys() & wanted.looks, False)
    rows, columns = linear_sum_assignment(soft.mean(axis=2), maximize=True)
    for row, column in zip(rows, columns, strict=True):
        thing, look = reading.things[column], wanted.looks[row]
        if look in near:
            near[look] = math.dist((thing.x, thing.y), wanted.places[look]) <= NEAR
        values[row] = soft[row, column]
        right[row] = agrees(thing, look)
    once = [is_once(reading.things, look) for look in wanted.looks]
    most = max(len(wanted.looks), len(reading.things))
    judged = {part: right[:, i].mean() for i, part in enumerate(PARTS)}
    judged |= {f"soft_{part}": values[:, i].mean() for i, part in enumerate(PARTS)}
    judged |= {
        "once": np.mean(once),
        "all_once": all(once) and len(reading.things) == len(wanted.looks),
        "mixing": mixes(reading.things, wanted.looks),
        "extra": len(reading.things) > len(wanted.looks),
        "background": reading.background == wanted.background,
        "soft_background": reading.grounds[BACKGROUNDS.index(wanted.background)],
        "same_place": np.mean(list(near.values())) if near else 0.0,
        "same_ground": reading.background == wanted.ground != wanted.background,
        "score": values.mean(axis=1).sum() / most,
    }
    return {name: float(value) for name, value in judged.items()}


def resemblances(things: Sequence[Thing], looks: Sequence[Look]) -> ndarray:
    """[looks, things, 3] probabilities that a thing has the look's shape, colour and pattern."""
    return np.array([[thing.probabilities(look) for thing in things] for look in looks]).reshape(
        len(looks), len(things), 3
    )


def agrees(thing: Thing, look: Look) -> list[bool]:
    """Whether a thing's shape, colour and pattern are the look's."""
    return [a == b for a, b in zip(thing.look, look, strict=True)]


def is_once(things: Sequence[Thing], look: Look) -> bool:
    """Whether exactly one thing has at least two of the look's shape, colour and pattern."""
    return sum(sum(agrees(thing, look)) >= 2 for thing in things) == 1


def mixes(things: Sequence[Thing], looks: Sequence[Look]) -> bool:
    """Whether some thing has the shape of one look and the colour or pattern of another."""
    return any(
        is_mixture(thing, look, other)
        for thing in things
        if thing.look not in looks
        for look in looks
        for other in looks
        if other != look
    )


def is_mixture(thing: Thing, look: Look, other: Look) -> bool:
    """Whether a thing has a look's shape, and a colour or pattern that only the other look has."""
    shape, *rest = thing.look
    return shape == look[0] and any(
        own != wanted and own == others
        for own, wanted, others in zip(rest, look[1:], other[1:], strict=True)
    )
