"""Values of the commands' options: numbers in their ranges, and files of concepts by their folder."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..jobs.inputs import CONCEPTS, CONDITION, in_folder


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type of whole numbers from `least` to `most`."""
    expected = f"a whole number from {least} to {most}"
    if most is None:
        expected = f"a whole number greater than {least - 1}" if least else "a whole number"

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """Return an argparse type of numbers from `least`, or only from `above` it, to `most`."""
    expected = (
        f"a number greater than {least:g} and at most {most:g}"
        if above
        else (f"a number from {least:g} to {most:g}")
    )
    if math.isinf(most):
        expected = f"a number of at least {least:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            raise ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive = whole(1)
seed = whole(0, 2**63 - 1)
rate = number(0.0, 1.0, above=True)
not_negative = number(0.0, math.inf)


def concepts(text: str) -> Path:
    """Parse the path of a concepts file, or of the folder that `learn` left it in; an argparse type."""
    return file_or_folder(text, CONCEPTS)


def condition(text: str) -> Path:
    """Parse the path of a condition file, or of the folder that `learn` left it in; an argparse type."""
    return file_or_folder(text, CONDITION)


def file_or_folder(text: str, name: str) -> Path:
    try:
        return in_folder(Path(text), name)
    except UserError as error:
        raise ArgumentTypeError(str(error)) from error
