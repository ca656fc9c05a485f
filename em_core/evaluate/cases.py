"""What benchmarks consist of: pictures to learn concepts from, and prompts to draw them with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..examples import Example
from ..prompts import ConceptPrompt


@dataclass(frozen=True)
class Case:
    """One run of a benchmark.

    Attributes:
        name: a name that is safe for a folder.
        read: reads the pictures to learn from, with masks where the data has them.
        prompts: what to draw.
    """

    name: str
    read: Callable[[], list[Example]]
    prompts: tuple[ConceptPrompt, ...]


def require_data(path: Path, what: str) -> Path:
    """Return a path of a data set that is there.

    Raises:
        UserError: it is not there.
    """
    if not path.exists():
        raise UserError(f"No {path}. Expected {what}.")
    return path
