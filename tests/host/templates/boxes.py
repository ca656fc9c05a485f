"""Boxes that lie beside and above one another, so that nothing of a drawn graph overlaps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

GAP = 24
BETWEEN_COLUMNS = 44
PADDING = 16
TITLE = 50
"""Pixels of a group's frame that its title takes."""


class Box(Protocol):
    """Something with a size that can be put somewhere."""

    def size(self) -> tuple[int, int]:
        """Width and height, with all that belongs to it."""

    def place(self, x: int, y: int) -> None:
        """Put its upper left corner there."""


@dataclass
class Row:
    """Boxes from left to right, their upper edges in line."""

    boxes: tuple[Box, ...]
    gap: int = BETWEEN_COLUMNS

    def size(self) -> tuple[int, int]:
        sizes = [box.size() for box in self.boxes]
        return sum(w for w, _ in sizes) + self.gap * (len(sizes) - 1), max(h for _, h in sizes)

    def place(self, x: int, y: int) -> None:
        for box in self.boxes:
            box.place(x, y)
            x += box.size()[0] + self.gap


@dataclass
class Column:
    """Boxes from top to bottom, their left edges in line."""

    boxes: tuple[Box, ...]
    gap: int = GAP

    def size(self) -> tuple[int, int]:
        sizes = [box.size() for box in self.boxes]
        return max(w for w, _ in sizes), sum(h for _, h in sizes) + self.gap * (len(sizes) - 1)

    def place(self, x: int, y: int) -> None:
        for box in self.boxes:
            box.place(x, y)
            y += box.size()[1] + self.gap


@dataclass
class Frame:
    """A group: a frame with a title around a box."""

    title: str
    inside: Box
    colour: str = "#3f789e"
    bounding: list[int] = field(default_factory=list)

    def size(self) -> tuple[int, int]:
        width, height = self.inside.size()
        return width + 2 * PADDING, height + TITLE + PADDING

    def place(self, x: int, y: int) -> None:
        self.bounding = [x, y, *self.size()]
        self.inside.place(x + PADDING, y + TITLE)


def row(*boxes: Box) -> Row:
    return Row(boxes)


def column(*boxes: Box) -> Column:
    return Column(boxes)


def group(title: str, *boxes: Box) -> Frame:
    """A group whose nodes lie in columns from left to right; a list of boxes is a column."""
    return Frame(title, boxes[0] if len(boxes) == 1 else Row(boxes, GAP))


def frames(box: Box) -> list[Frame]:
    """All groups in a box, from the outside inwards."""
    here = [box] if isinstance(box, Frame) else []
    inner = [box.inside] if isinstance(box, Frame) else list(getattr(box, "boxes", ()))
    return [*here, *(frame for each in inner for frame in frames(each))]
