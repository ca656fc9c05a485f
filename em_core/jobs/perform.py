"""Do one job from its files to its place among the results, whatever goes wrong."""

import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import (
    Notice,
    TrainingError,
    UserError,
    is_disk_full,
    is_out_of_memory,
    is_passing,
)
from ..runs.key import pack_digest
from .folder import BatchFolder
from .keys import Task, job_key, loading
from .kinds import DO, Found, Work
from .models import Facts, forget_host, host_of

Stop = Callable[[], bool]
DONE, FOUND, FAILED = "done", "found", "failed"
STOPPED, BUSY, PASSING, FULL = "stopped", "busy", "passing", "full"
REFUSED, LOST, BROKEN = "refused", "lost", "broken"
AGAIN = (BUSY, PASSING, LOST, BROKEN)


class Stopped(Exception):
    """A job was asked to stop; its state is kept."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        key: the job's key.
        status: "done", or "found" if it was before; "failed" if it cannot be done; "stopped"; "busy" if
            someone else is doing it; "passing" if it may work at another time, "full" if the disk is;
            "refused" by a worker that is not like the others; "lost" with its worker, "broken" if the worker
            can do nothing any more.
        error: what went wrong.
    """

    key: str
    status: str
    error: str = ""

    @property
    def fatal(self) -> bool:
        """Whether the process that says so can do nothing any more."""
        return self.status == BROKEN


def perform(task: Task, stop: Stop) -> Outcome:
    """Do a job, if it is not done; its files are in the batch's folder afterwards.

    Args:
        task: the job.
        stop: whether to stop; the state is kept then.
    """
    if task.pack != pack_digest():
        return Outcome(task.key, REFUSED, other_version(task))
    folder = BatchFolder(task.out)
    if folder.finished(task.key):
        return Outcome(task.key, FOUND)
    try:
        with folder.claimed(task.key) as mine:
            if not mine:
                return Outcome(task.key, BUSY)
            if folder.finished(task.key):
                return Outcome(task.key, FOUND)
            return do(task, folder, stop)
    except UserError as error:  # the batch's folder cannot be written to
        return wrong(task, folder, error)


def other_version(task: Task) -> str:
    """Say that a worker has another version of this package."""
    return (
        f"The worker on {platform.node()} has another version of Visual Concepts than the one that started the "
        f"batch ({pack_digest()[:12]} instead of {task.pack[:12]}), so results would not be comparable. Install "
        "the same version on all machines."
    )


def do(task: Task, folder: BatchFolder, stop: Stop) -> Outcome:
    """Do a job that is this process's alone."""
    if stop():
        return Outcome(task.key, STOPPED)
    began = time.monotonic()
    made = folder.work(task.key) / "made"
    try:
        with threads(task.job.threads), noticing() as notes:
            found, plan = with_memory(task, folder, made, stop)
        folder.publish(task.key, made, record(task, found, plan, notes, time.monotonic() - began))
    except Stopped:
        return Outcome(task.key, STOPPED)
    except Refused as error:
        return Outcome(task.key, REFUSED, str(error))
    except Exception as error:  # one job's trouble is not another's
        return wrong(task, folder, error)
    return Outcome(task.key, DONE)


class Refused(Exception):
    """The worker's model is another than the batch's."""


def with_memory(task: Task, folder: BatchFolder, made: Path, stop: Stop) -> tuple[Found, str]:
    """Do a job; if memory runs out in learning, go on from its state with what memory plans find to fit.

    Returns:
        What was found, and how the model was loaded: "as asked", or "as planned".

    Raises:
        UserError: there is not enough memory.
    """
    try:
        return attempt(task, folder, made, stop), "as asked"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    forget_host()  # outside the handler, since the error holds the frames that hold the tensors
    if task.job.kind == "learn":
        return attempt(task, folder, made, stop, planned=True), "as planned"
    raise UserError(
        "Not enough memory on the device. Use smaller pictures, or give each job more of a card."
    )


def attempt(
    task: Task, folder: BatchFolder, made: Path, stop: Stop, *, planned: bool = False
) -> Found:
    """Do a job; what is left of an attempt before is removed."""
    if planned:
        facts = Facts(task.model, task.family)
    else:
        facts = host_of(loading(task.job))[1]
        require_same(task, facts)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)

    def check() -> None:
        if stop():
            raise Stopped

    work = Work(task.job, task.key, facts, folder.work(task.key), made, check, planned)
    return DO[task.job.kind](work)


def require_same(task: Task, facts: Facts) -> None:
    """Refuse a job whose model or files are not those that its key was made from.

    Raises:
        Refused: this worker has another model under the same name.
        UserError: a file of the job was changed since.
    """
    if facts.digest != task.model:
        raise Refused(
            f"The worker on {platform.node()} finds another model as {task.job.model.source} than the batch began "
            "with, so results would not be comparable. Give all machines the same files and number type."
        )
    if job_key(task.job, facts) != task.key:
        raise UserError(
            "A file of the job was changed since the batch began. Start the batch again."
        )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def noticing() -> Iterator[list[str]]:
    """Collect what users should know; it goes into the index."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        yield notes
    for warning in caught:
        if issubclass(warning.category, Notice) and str(warning.message) not in notes:
            notes.append(str(warning.message))


def record(task: Task, found: Found, plan: str, notes: list[str], seconds: float) -> dict[str, Any]:
    """Return what is said of a finished job."""
    return {
        "kind": task.job.kind,
        "seconds": round(seconds, 3),
        **asdict(found),
        "notes": notes,
        "threads": task.job.threads,
        "device": task.job.model.device_type,
        "memory": plan,
        "torch": str(torch.__version__),
        "machine": platform.node(),
    }


def wrong(task: Task, folder: BatchFolder, error: Exception) -> Outcome:
    """Say what went wrong; what no other time or place would mend is kept as a failure."""
    text = str(error) if isinstance(error, (UserError, TrainingError)) else f"{error!r}"
    if is_disk_full(error):
        return Outcome(task.key, FULL, text)
    if is_passing(error):
        return Outcome(task.key, PASSING, text)
    if "CUDA error" in text:
        return Outcome(task.key, BROKEN, text)
    try:
        folder.fail(task.key, {"key": task.key, "kind": task.job.kind, "error": text})
    except UserError as unwritten:
        return Outcome(task.key, FULL if is_disk_full(unwritten) else PASSING, str(unwritten))
    return Outcome(task.key, FAILED, text)
