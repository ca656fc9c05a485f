"""Inputs that are "automatic" or a number: what they offer, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from .schema import ADVANCED

AUTOMATIC = "automatic"


@dataclass(frozen=True)
class Number:
    """An input that is "automatic", which is the value that suits the model, or a number of one's own.

    Attributes:
        label: its name on the node, with its unit.
        tooltip: what it does.
        least, most: the range, ends included.
        whole: whether only whole numbers count.
    """

    label: str
    tooltip: str
    least: float
    most: float
    whole: bool = True

    @property
    def range(self) -> str:
        if 0 < self.least < 1e-4:
            return f"a number above 0, at most {self.most:g}"
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.least:g} to {self.most:g}"

    def input(self, name: str, **more: Any) -> Any:
        """The input under this id: a line of text, which links of text may feed as well."""
        return io.String.Input(
            name, display_name=self.label, default=AUTOMATIC, optional=True,
            tooltip=f"{self.tooltip} 'automatic' is what suits the model; else {self.range}.", **more,
        )  # fmt: skip

    def read(self, text: Any) -> int | float | None:
        """Return the number, or None for "automatic".

        Raises:
            UserError: it is neither, or out of range.
        """
        said = "" if text is None else str(text).strip()
        if said.lower() in ("", "auto", AUTOMATIC):
            return None
        try:
            value = float(said.replace(",", "."))
        except ValueError:
            value = float("nan")
        if not self.least <= value <= self.most or (self.whole and value != int(value)):
            raise UserError(
                f"Bad value of '{self.label}'. Expected 'automatic' or {self.range}, got {said!r}."
            )
        return int(value) if self.whole else value


def advanced_inputs(numbers: Mapping[str, Number]) -> list[Any]:
    """Return the inputs of these numbers, by id, marked as advanced."""
    return [number.input(name, **ADVANCED) for name, number in numbers.items()]


def read(numbers: Mapping[str, Number], given: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the numbers that are not automatic, by id.

    Raises:
        UserError: one is neither "automatic" nor a number in its range.
    """
    values = {name: number.read(given.get(name)) for name, number in numbers.items()}
    return {name: value for name, value in values.items() if value is not None}


def checked(numbers: Mapping[str, Number], given: Mapping[str, Any]) -> bool | str:
    """What `validate_inputs` returns for these inputs: True, or what is wrong with the first bad one."""
    return why_not(read, numbers, given) or True


def why_not(check: Callable[..., Any], *inputs: Any) -> str:
    """Return what a check refuses these inputs for; empty if it does not."""
    try:
        check(*inputs)
    except UserError as error:
        return str(error)
    return ""
