"""The index of a batch: a line for each of its jobs, with what came of it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.tables import Cell, written
from ..files import write_aside, write_text
from .folder import BatchFolder
from .perform import FAILED

JSONL, CSV = "index.jsonl", "index.csv"
WAITING, DONE = "waiting", "done"
COLUMNS = ("name", "kind", "status", "seconds", "iou", "areas", "missing", "error", "notes",
           "folder", "files", "key")  # fmt: skip


@dataclass
class Entry:
    """What is known of a job while its batch runs.

    Attributes:
        name, kind: the job's.
        key: its key, "" if it has none or is not known yet.
        status: of its last outcome, "" before there is one.
        error: why it has no key, or what went wrong at the last try.
    """

    name: str
    kind: str
    key: str = ""
    status: str = ""
    error: str = ""


def lines(folder: BatchFolder, entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
    """Yield the line of each job from what is on the disk now; only what is whole counts as done."""
    for entry in entries:
        line: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "key": entry.key}
        record = folder.finished(entry.key) if entry.key else None
        if record is not None:
            rest = {name: value for name, value in record.items() if name not in line}
            where = folder.result(entry.key).relative_to(folder.root).as_posix()
            yield {
                **line,
                "status": DONE,
                **rest,
                "files": sorted(record["files"]),
                "folder": where,
            }
            continue
        failure = folder.failed(entry.key) if entry.key else None
        if failure is not None or entry.status == FAILED:
            yield {**line, "status": FAILED, "error": (failure or {}).get("error", entry.error)}
        else:
            yield {**line, "status": WAITING, "error": entry.error}


def write_index(folder: BatchFolder, entries: Sequence[Entry], end: str = "") -> None:
    """Write index.jsonl and index.csv, each whole or not at all.

    Args:
        folder: the batch's.
        entries: its jobs, in their order.
        end: what the files' names have before their ending, for a part of a batch.

    Raises:
        UserError: they cannot be written.
    """
    root = folder.root
    rows: list[Sequence[Cell]] = []

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8") as file:
            for line in lines(folder, entries):
                file.write(json.dumps(line) + "\n")
                rows.append([cell(line.get(column)) for column in COLUMNS])

    write_aside(root / named(JSONL, end), write)
    write_text(root / named(CSV, end), written(COLUMNS, rows))


def named(name: str, end: str) -> str:
    """Return a file's name with something before its ending."""
    file = Path(name)
    return f"{file.stem}{end}{file.suffix}"


def cell(value: Any) -> Cell:
    """Return a value as a cell of a table, such as `rex 0.81; doll 0.77`."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {cell(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(str(part) for part in value)
    return value if isinstance(value, (int, float)) or value is None else str(value)
