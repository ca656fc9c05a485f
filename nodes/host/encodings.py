"""What a CLIP has encoded, looked up again by its values: other nodes join, average and copy it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...em_core.errors import UserError

KEPT = 64
CLOSE = 1e-3


@dataclass(frozen=True)
class Columns:
    """The positions of the concepts' vectors in an encoded text, the same for all its samples.

    Attributes:
        positions: pairs of a concept and the positions of its vectors.
        length: tokens of the text.
    """

    positions: tuple[tuple[str, tuple[int, ...]], ...]
    length: int


@dataclass
class Encodings:
    """The latest texts that a CLIP has encoded, with the columns at which concepts stand.

    Attributes:
        kept: pairs of an encoded text [t, d] and its columns, the oldest first.
    """

    kept: list[tuple[Float[Tensor, "_ _"], Columns]] = field(default_factory=list)

    def add(self, text: Float[Tensor, "b t d"], found: Mapping[str, tuple[int, ...]]) -> Columns:
        """Remember a text and return its columns."""
        columns = Columns(tuple(found.items()), text.shape[1])
        row = text[0].detach().float().cpu().clone()
        self.kept = [old for old in self.kept if not same(old[0], row)][-KEPT + 1 :]
        self.kept.append((row, columns))
        return columns

    def find(self, text: Float[Tensor, "b t d"] | None) -> Columns | None:
        """Return the columns of a text that consists of remembered ones; None if there is an unknown part.

        Raises:
            UserError: the samples of one conditioning have their concepts at different places.
        """
        if text is None or not self.kept:
            return None
        found = {self.of_row(row.detach().float().cpu()) for row in text}
        if len(found) > 1:
            raise UserError(
                "The masks of Apply Concept Tokens cannot act on a batch of different prompts in one "
                "conditioning. Encode each prompt on its own, or leave the masks out."
            )
        return found.pop()

    def of_row(self, row: Float[Tensor, "t d"]) -> Columns | None:
        """Return the columns of one sample's text: joined from remembered ones, or a mean of two."""
        return self.joined(row) or self.averaged(row)

    def joined(self, row: Float[Tensor, "t d"]) -> Columns | None:
        """Return the columns of remembered texts that stand one after another (Conditioning Concat).

        What another CLIP has encoded may stand between them.
        """
        places: dict[str, tuple[int, ...]] = {}
        chunk = min(columns.length for _, columns in self.kept)
        known, start = False, 0
        while start < len(row):
            part = self.beginning(row[start:])
            if part is not None:
                known = True
                merge(places, part, start)
            start += chunk if part is None else part.length
        return Columns(tuple(places.items()), len(row)) if known else None

    def beginning(self, row: Float[Tensor, "t d"]) -> Columns | None:
        """Return the columns of the longest remembered text that `row` begins with."""
        fitting = [c for text, c in self.kept if same(text, row[: len(text)])]
        return max(fitting, key=lambda columns: columns.length, default=None)

    def averaged(self, row: Float[Tensor, "t d"]) -> Columns | None:
        """Return the columns of both texts that `row` is a weighted mean of (Conditioning Average)."""
        fitting = [(fit(text, len(row)), columns) for text, columns in self.kept]
        for (first, columns), (second, others) in combinations(fitting, 2):
            if (columns.positions or others.positions) and is_between(row, first, second):
                places: dict[str, tuple[int, ...]] = {}
                for part in (columns, others):
                    merge(places, part, 0, len(row))
                return Columns(tuple(places.items()), len(row))
        return None


def merge(
    places: dict[str, tuple[int, ...]], columns: Columns, start: int, end: int | None = None
) -> None:
    """Add the columns of a part that begins at `start` to those of the whole, up to `end`."""
    for name, positions in columns.positions:
        moved = [start + position for position in positions]
        inside = [position for position in moved if end is None or position < end]
        places[name] = tuple(sorted({*places.get(name, ()), *inside}))


def same(first: Tensor, second: Tensor) -> bool:
    """Return whether two texts are equal up to a number type's rounding."""
    return first.shape == second.shape and bool(
        torch.dist(first, second) <= CLOSE * first.norm().clamp(min=1e-6)
    )


def fit(text: Float[Tensor, "t d"], length: int) -> Tensor:
    """Return a text cut or filled with zeros to a length, as Conditioning Average does."""
    return F.pad(text[:length], (0, 0, 0, max(0, length - len(text))))


def is_between(row: Tensor, first: Tensor, second: Tensor) -> bool:
    """Return whether `row` lies on the way from one text to another: its end first, which is quick."""
    for part in (slice(-1, None), slice(None)):
        here, way = row[part] - second[part], first[part] - second[part]
        share = (here * way).sum() / way.square().sum().clamp(min=1e-12)
        if torch.dist(here, share * way) > CLOSE * row[part].norm().clamp(min=1e-6):
            return False
    return bool(0 < share < 1)
