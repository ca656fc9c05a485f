"""Work on many items in several processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from .executors import Lost, Stop

POLL_SECONDS = 0.2
LAST_SECONDS = 10.0  # what a worker has to keep its state when who started it is gone
END_SECONDS = 5.0


class Workers:
    """Processes that each work on one item at a time; one that dies is replaced.

    They are started afresh, not forked. They end when this process does, however it ends: a job at work is
    told to stop first.
    """

    def __init__(
        self, count: int, threads: int = 1, environments: Iterable[Mapping[str, str]] = ()
    ) -> None:
        """
        Args:
            count: how many.
            threads: OMP_NUM_THREADS of each.
            environments: further environment variables of each worker.
        """
        self.context = multiprocessing.get_context("spawn")
        given = [*environments]
        self.environments = [
            {"OMP_NUM_THREADS": str(threads), **(given[i] if i < len(given) else {})}
            for i in range(count)
        ]
        self.halt = self.context.Event()
        self.workers: list[Worker | None] = [None] * count

    def map(
        self, work: Callable[[Any, Stop], Any], items: Iterable[Any], stop: Stop
    ) -> Iterator[tuple[Any, Any]]:
        self.halt.clear()
        left, busy = iter(items), 0
        while True:
            if stop():
                self.halt.set()
            for number in range(len(self.workers)):
                if stop() or self.is_busy(number):
                    continue
                item = next(left, self)
                if item is self:
                    break
                self.worker(number).give(work, item)
            busy = sum(self.is_busy(number) for number in range(len(self.workers)))
            if not busy:
                return
            yield from self.results()

    def is_busy(self, number: int) -> bool:
        worker = self.workers[number]
        return worker is not None and worker.busy

    def worker(self, number: int) -> "Worker":
        """Return a living worker; one that has died, or was told to end, is replaced."""
        worker = self.workers[number]
        if worker is None or not worker.process.is_alive():
            with environment(self.environments[number]):
                worker = Worker(self.context, self.halt)
            self.workers[number] = worker
        return worker

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Yield what has come in, after waiting a moment for it."""
        busy = [worker for worker in self.workers if worker is not None and worker.busy]
        ready = wait([worker.pipe for worker in busy], timeout=POLL_SECONDS)
        for worker in busy:
            if worker.pipe in ready:
                yield worker.item, worker.take()

    def close(self) -> None:
        """End all processes; those that are at work are killed."""
        for worker in self.workers:
            if worker is not None:
                worker.end()
        self.workers = [None] * len(self.workers)


class Worker:
    """One process, and the item that it has.

    Attributes:
        item: the item it works on.
        busy: whether it works on one.
    """

    def __init__(self, context: Any, halt: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(theirs, halt), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.item: Any = None
        self.busy = False

    def give(self, work: Callable[[Any, Stop], Any], item: Any) -> None:
        """Send it an item to work on."""
        self.item, self.busy = item, True
        with suppress(OSError):  # it is dead, which taking its result will say
            self.pipe.send((work, item))

    def take(self) -> Any:
        """Return the result of its item, or that it is lost."""
        self.busy = False
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(END_SECONDS)
            self.end()
            return Lost(f"its process ended with exit code {self.process.exitcode}")

    def end(self) -> None:
        """End the process; it is killed if it is at work."""
        with suppress(OSError):
            self.pipe.close()
        if self.busy:
            self.process.kill()
        self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, halt: Any) -> None:
    """Work on what comes through the pipe until it is closed, in a process of its own."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process; the first one decides
    threading.Thread(target=leave_with_parent, args=(halt,), daemon=True).start()
    while True:
        try:
            work, item = pipe.recv()
        except (EOFError, OSError):
            return
        result = work(item, halt.is_set)
        try:
            pipe.send(result)
        except OSError:
            return
        if getattr(result, "fatal", False):  # its card does not answer any more
            return


def leave_with_parent(halt: Any) -> None:
    """Wait until the process that started this one is gone; then stop the job, and end."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    with suppress(OSError):
        halt.set()
    threading.Event().wait(LAST_SECONDS)
    os._exit(1)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def card_environments(count: int, device: str) -> list[dict[str, str]]:
    """Return for each worker the graphics card that it sees, in turn; nothing on other devices."""
    if device != "cuda":
        return [{} for _ in range(count)]
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cards = [card for card in named.split(",") if card] or [
        str(card) for card in range(torch.cuda.device_count())
    ]
    if not cards:
        return [{} for _ in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": cards[i % len(cards)]} for i in range(count)]
