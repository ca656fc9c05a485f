"""Runs in a folder of bounded size, found again by their keys."""

import os
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..errors import StoreWarning, UserError
from ..examples import Example
from .concept_set import ConceptSet
from .state_file import StateFile
from .truth import truth_digest
from .visual_condition import VisualCondition

MOST_BYTES = 2 * 2**30
MOST_FILES = 64
STATE = ".state.safetensors"
Result = TypeVar("Result", ConceptSet, VisualCondition)
ABANDONED_SECONDS = 24 * 3600.0


class RunStore:
    """Finished runs, and the states of stopped ones, in a folder that may be deleted at any time.

    It holds at most 64 files and 2 GB; the files that have been unused the longest are deleted first.
    It is a cache, which several processes may share: nothing that fails in it stops a run, and what
    could not be kept is said by a StoreWarning.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def state(self, key: str, examples: Sequence[Example] = ()) -> StateFile:
        """Return the file in which the state of an unfinished run on these examples is kept."""
        return StateFile(self.folder / f"{key}{STATE}", key, truth_digest(examples))

    def result_file(self, key: str, kind: type[Any] = ConceptSet) -> Path:
        """Return the path at which the result of a finished run is kept."""
        return self.folder / f"{key}{kind.FILE}"

    def finished(
        self,
        key: str,
        examples: Sequence[Example] | None = None,
        kind: type[Result] = ConceptSet,  # type: ignore[assignment]
    ) -> Result | None:
        """Return the result of a finished run, or None; a damaged file is deleted and counts as none.

        Its IoU is that with the true masks of `examples`, or of the run's own if there are none given.
        """
        file = self.result_file(key, kind)
        if not os.path.isfile(file):
            return None
        try:
            found = kind.load(file)
        except UserError:
            with suppress(OSError):
                file.unlink()
            return None
        with suppress(OSError):  # only the order of deletion depends on it
            os.utime(file)
        return found if examples is None else found.compared(examples)

    def keep(self, key: str, result: Result) -> None:
        """Store the result of a finished run and delete its state, or warn that this failed."""
        file = self.result_file(key, type(result))
        try:
            result.save(file)
            self.state(key).remove()
        except (UserError, OSError) as error:
            warnings.warn(
                f"The concepts are learned, but not remembered for next time. {error}",
                StoreWarning,
                stacklevel=2,
            )
        self.prune(keep=file)

    def prune(self, keep: Path) -> None:
        """Delete the files that have been unused the longest, except `keep`, until the bounds hold.

        Files that another process is just writing are left alone, unless they are a day old; so are
        those that it is reading or has removed.
        """
        now = time.time()
        for file in self.folder.glob(".*.safetensors"):
            with suppress(OSError):
                if now - file.stat().st_mtime > ABANDONED_SECONDS:
                    file.unlink()
        found: list[tuple[float, int, Path]] = []
        for file in self.folder.glob("[!.]*.safetensors"):
            with suppress(OSError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        total, count = sum(size for _, size, _ in found), len(found)
        for changed, size, file in sorted(found):
            if total <= MOST_BYTES and count <= MOST_FILES:
                return
            if file != keep and removed(file, changed):
                total, count = total - size, count - 1


def removed(file: Path, changed: float) -> bool:
    """Delete a file unless another process has used it since; return whether it is gone."""
    try:
        if file.stat().st_mtime != changed:
            return False
        file.unlink()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
