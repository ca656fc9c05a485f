"""The folder of a batch: results by their keys, work under way, and what went wrong.

    results/KEY/    the files of a finished job, with its record in result.json
    work/KEY/       the state of one that is not finished
    failed/KEY.json why one cannot be done

A job's files become visible by one rename, when all of them are on the disk. Several machines may share the
folder; who works on a job holds a lock on it, which the system releases when its process ends however it
ends. No time of one machine is ever compared with that of another.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import flush_to_disk, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RECORD = "result.json"
LOCK, TRIES = "lock", 10
THERE = {errno.EEXIST, errno.ENOTEMPTY, errno.EACCES}
VANISHED = {errno.ENOENT, errno.EEXIST, errno.ESTALE}  # as a folder is that is just being removed
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class BatchFolder:
    """Results, work and failures of jobs, by their keys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def result(self, key: str) -> Path:
        return self.root / "results" / key

    def work(self, key: str) -> Path:
        return self.root / "work" / key

    def failure(self, key: str) -> Path:
        return self.root / "failed" / f"{key}.json"

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return the record of a finished job; None if it is not finished, or a file of it is not whole."""
        folder = self.result(key)
        record = read_record(folder / RECORD)
        if record is None or record.get("key") != key:
            return None
        for name, size in record["files"].items():
            try:
                if (folder / name).stat().st_size != size:
                    return None
            except OSError:
                return None
        return record

    def failed(self, key: str) -> dict[str, Any] | None:
        """Return the record of a job that cannot be done, or None."""
        return read_record(self.failure(key))

    def fail(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep why a job cannot be done."""
        write_json(self.failure(key), dict(record))

    def publish(self, key: str, made: Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """Give the files that a job made their place, all at once, and forget its state and failure.

        Args:
            made: the folder that they are in, on the same disk.
            record: what is said of them.

        Raises:
            UserError: they cannot be written.
        """
        files = {
            file.relative_to(made).as_posix(): file.stat().st_size
            for file in sorted(made.rglob("*"))
            if file.is_file() and file != made / RECORD
        }
        whole = {**record, "key": key, "files": files}
        write_json(made / RECORD, whole)
        target = self.result(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and self.finished(key) is None:
                shutil.rmtree(target)  # someone has taken a file out of it
            os.rename(made, target)
            with suppress(OSError):
                flush_to_disk(target.parent)
        except OSError as error:
            if error.errno not in THERE or self.finished(key) is None:
                raise UserError(f"Could not write {target}: {error}.") from error
        with suppress(OSError):
            self.failure(key).unlink(missing_ok=True)
        shutil.rmtree(self.work(key), ignore_errors=True)
        return self.finished(key) or whole

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Hold a job as long as one works on it; False if someone else does.

        Where a shared folder has no locks, everybody gets the job: work may then be done twice, but the
        first result stands and is whole.

        Raises:
            UserError: the folder cannot be written to.
        """
        handle = open_lock(self.work(key))
        try:
            yield try_lock(handle)
        finally:
            os.close(handle)
            if self.result(key).exists():  # its lock may have been made after the others had gone
                shutil.rmtree(self.work(key), ignore_errors=True)


def open_lock(folder: Path) -> int:
    """Open the file that is locked; who has just finished the job may be removing its folder.

    Raises:
        UserError: the folder cannot be written to.
    """
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if left == 0 or error.errno not in VANISHED:
                raise UserError(f"Could not write to {folder}: {error}.") from error
    raise UserError(f"{folder} is removed again and again. Leave the batch's folder alone.")


def try_lock(handle: int) -> bool:
    """Lock an open file for this process; False if another one has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def read_record(file: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
