"""What this system lacks: files that cannot be replaced or deleted while they are open or mapped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LINUX = os.path.exists("/proc/self/maps")


def in_use(path: Any) -> bool:
    """Whether this process has the file open or mapped into its memory."""
    name = os.path.realpath(path)
    if name in Path("/proc/self/maps").read_text():
        return True
    handles = (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
    return any(os.path.realpath(handle) == name for handle in handles)


@contextmanager
def windows_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `os.replace` and deletion fail as on Windows, for files that this process uses."""
    replace, unlink = os.replace, os.unlink

    def refuse(path: Any) -> None:
        if in_use(path):
            raise PermissionError(13, "The process cannot access the file", str(path))

    def locked_replace(source: Any, target: Any, **more: Any) -> None:
        refuse(source)
        refuse(target)
        replace(source, target, **more)

    def locked_unlink(path: Any, **more: Any) -> None:
        refuse(path)
        unlink(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", locked_replace)
        patch.setattr(os, "unlink", locked_unlink)
        yield


def differ_in_case(folder: Path) -> list[str]:
    """Names of a folder that Windows and Macs take for the name of another file in it."""
    names = sorted(file.name for file in folder.iterdir())
    folded = [name.casefold() for name in names]
    return [name for name in names if folded.count(name.casefold()) > 1]
