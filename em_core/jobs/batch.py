"""Run a batch: key its jobs, give them to an executor, and keep the index."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from ..errors import UserError
from .contact import write_sheets
from .executors import Executor, Lost, Stop
from .folder import BatchFolder
from .index import Entry, lines, write_index
from .job import Job, Model
from .keys import Task, loading, task_of
from .models import Facts, facts_of
from .perform import (
    AGAIN,
    BUSY,
    DONE,
    FAILED,
    FOUND,
    FULL,
    LOST,
    REFUSED,
    STOPPED,
    Outcome,
    perform,
)

OK, BAD, TRY_AGAIN = 0, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h
INDEX_SHARE = 20  # at most a twentieth of the time is spent on writing the index
INDEX_SECONDS, WAIT_SECONDS, SLICE_SECONDS = 30.0, 1.0, 0.2
Watch = Callable[[Entry, Outcome], None]


@dataclass
class Batch:
    """A batch that runs.

    Attributes:
        jobs: its jobs.
        folder: where everything goes.
        executor: what carries them out.
        stop: whether to stop.
        watch: called with each job and its outcome.
        retries: how often a job is tried again after a fault that passes.
        end: what files of a part of a batch have in their names.
        entries: what is known of each job.
        halted: the outcome that ended the batch early, if one did.
    """

    jobs: Sequence[Job]
    folder: BatchFolder
    executor: Executor
    stop: Stop
    watch: Watch = lambda entry, outcome: None
    retries: int = 3
    end: str = ""
    entries: list[Entry] = field(default_factory=list)
    halted: Outcome | None = None
    numbers: dict[str, list[int]] = field(default_factory=dict)
    wrote: float = field(default_factory=time.monotonic)
    took: float = 0.0

    def __post_init__(self) -> None:
        self.entries = [Entry(job.name, job.kind) for job in self.jobs]

    def run(self) -> int:
        """Do what is not done yet, and write the index and the contact sheets.

        Returns:
            The exit status: 0 if all is done, 2 if something cannot be, 75 if the same command may do more.

        Raises:
            UserError: the index cannot be written.
        """
        try:
            self.rounds(self.facts())
        finally:
            if self.halted is None:
                self.finish()
            else:  # perhaps there is no room for it, which is said already
                with suppress(UserError):
                    self.finish()
        return self.exit_status()

    def finish(self) -> None:
        """Write what sums the batch up."""
        write_index(self.folder, self.entries, self.end)
        write_sheets(self.folder.root, lines(self.folder, self.entries), self.end)

    def exit_status(self) -> int:
        if self.halted is not None:
            return BAD if self.halted.status == REFUSED else TRY_AGAIN
        statuses = {entry.status for entry in self.entries}
        if statuses <= {DONE, FOUND}:
            return OK
        return BAD if statuses <= {DONE, FOUND, FAILED} else TRY_AGAIN

    def halting(self) -> bool:
        return self.halted is not None or self.stop()

    def facts(self) -> dict[Model, Facts]:
        """Return the facts of each model, as a worker finds them."""
        models: dict[Model, None] = {}
        for job in self.jobs:
            with suppress(UserError):  # said when the job gets its key
                models.setdefault(loading(job))
        found = {}
        for model, facts in self.executor.map(facts_by_worker, list(models), self.halting):
            if isinstance(facts, Lost):
                facts = Facts(error=f"The process that loaded the model ended: {facts.why}.")
            found[model] = facts
        return found

    def rounds(self, facts: dict[Model, Facts]) -> None:
        """Do all jobs; those that may work at another time again, up to `retries` times."""
        tries: Counter[str] = Counter()
        tasks: Iterable[Task] = self.tasks(facts)
        while True:
            again: list[Task] = []
            busy = True
            for task, result in self.executor.map(perform, tasks, self.halting):
                outcome = (
                    Outcome(task.key, LOST, result.why) if isinstance(result, Lost) else result
                )
                self.take(outcome)
                if may_work_again(outcome, self.halting()):
                    busy &= outcome.status == BUSY
                    tries[task.key] += outcome.status != BUSY
                    if tries[task.key] <= self.retries:
                        again.append(task)
                self.write_now_and_then()
            if not again or self.halting():
                return
            self.wait(WAIT_SECONDS if busy else WAIT_SECONDS * 2 ** max(tries.values()))
            tasks = again

    def tasks(self, facts: dict[Model, Facts]) -> Iterator[Task]:
        """Yield what is to be done, model by model; what is done, or can have no key, is taken at once."""
        order = sorted(range(len(self.jobs)), key=lambda i: str(self.jobs[i].model))
        for number in order:
            job = self.jobs[number]
            task = keyed(job, facts, self.folder)
            if task is None:
                return  # stopped before the model's facts were known
            known = self.numbers.setdefault(task.key, [])
            known.append(number)
            self.entries[number].key = task.key
            if not task.key:
                self.numbers[""] = [number]
                self.take(Outcome("", FAILED, task.error))
            elif len(known) > 1:
                self.follow(known[0], number)
            elif self.folder.finished(task.key):
                self.take(Outcome(task.key, FOUND))
            else:
                yield task

    def take(self, outcome: Outcome) -> None:
        """Note what came of a job, and of all others that are the same."""
        if outcome.status in (FULL, REFUSED):
            self.halted = self.halted or outcome
        for number in self.numbers[outcome.key]:
            entry = self.entries[number]
            entry.status, entry.error = outcome.status, outcome.error
            self.watch(entry, outcome)

    def follow(self, first: int, number: int) -> None:
        """Note for a job what came of the same one before it, if that is known already."""
        known, entry = self.entries[first], self.entries[number]
        entry.status, entry.error = known.status, known.error
        if known.status:
            self.watch(entry, Outcome(known.key, known.status, known.error))

    def write_now_and_then(self) -> None:
        """Write the index if it is time to."""
        now = time.monotonic()
        if now - self.wrote > max(INDEX_SECONDS, INDEX_SHARE * self.took):
            with suppress(UserError):  # said at the end, if it still cannot be written
                write_index(self.folder, self.entries, self.end)
            self.wrote = time.monotonic()
            self.took = self.wrote - now

    def wait(self, seconds: float) -> None:
        """Wait before trying again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.halting():
            time.sleep(SLICE_SECONDS)


def may_work_again(outcome: Outcome, halting: bool) -> bool:
    """Return whether to try again; who was stopped by somebody else is, too."""
    return outcome.status in AGAIN or (outcome.status == STOPPED and not halting)


def keyed(job: Job, facts: dict[Model, Facts], folder: BatchFolder) -> Task | None:
    """Return a job with its key, or with why it has none; None if its model's facts are not known."""
    try:
        model = loading(job)
    except UserError as error:
        return Task(job, "", folder.root, error=str(error))
    return task_of(job, facts[model], folder.root) if model in facts else None


def facts_by_worker(model: Model, stop: Stop) -> Facts:
    """Return a model's facts; it stays loaded for the jobs that follow."""
    return facts_of(model)
