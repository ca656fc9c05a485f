"""Runs in a folder of bounded size, found again by their keys."""

import os
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from .concept_set import ConceptSet
from .state_file import StateFile

MOST_BYTES = 2 * 2**30
MOST_FILES = 64
STATE, CONCEPTS = ".state.safetensors", ".concepts.safetensors"


class RunStore:
    """Finished runs, and the states of stopped ones, in a folder that may be deleted at any time.

    It holds at most 64 files and 2 GB; the files that have been unused the longest are deleted first.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def state(self, key: str) -> StateFile:
        """Return the file in which the state of an unfinished run is kept."""
        return StateFile(self.folder / f"{key}{STATE}", key)

    def concepts_file(self, key: str) -> Path:
        """Return the path at which the result of a finished run is kept."""
        return self.folder / f"{key}{CONCEPTS}"

    def finished(self, key: str) -> ConceptSet | None:
        """Return the result of a finished run, or None; a damaged file is deleted and counts as none."""
        file = self.concepts_file(key)
        if not file.is_file():
            return None
        try:
            found = ConceptSet.load(file)
        except UserError:
            file.unlink(missing_ok=True)
            return None
        os.utime(file)
        return found

    def keep(self, key: str, concepts: ConceptSet) -> None:
        """Store the result of a finished run, and delete its state."""
        file = self.concepts_file(key)
        concepts.save(file)
        self.state(key).remove()
        self.prune(keep=file)

    def prune(self, keep: Path) -> None:
        """Delete the files that have been unused the longest, except `keep`, until the bounds hold.

        Files that are just being written, and those that another process has removed, do not count.
        """
        found: list[tuple[float, int, Path]] = []
        for file in self.folder.glob("[!.]*.safetensors"):
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        total, count = sum(size for _, size, _ in found), len(found)
        for _, size, file in sorted(found):
            if total <= MOST_BYTES and count <= MOST_FILES:
                return
            if file != keep:
                total, count = total - size, count - 1
                file.unlink(missing_ok=True)
