"""Work on many items on a Ray cluster, as tasks."""

import os
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import Notice, UserError
from ..runs.runner import stop_on_signal
from .executors import Lost, Stop

WAIT_SECONDS = 0.5
ANSWER_SECONDS = 10.0
ADDRESS = re.compile(r"([\w.-]+):(\d{1,5})")
AHEAD = 1000  # tasks that wait on the cluster, so that one that grows sees what for
LEAST_VERSION = "2.9"


class PassingError(ConnectionError):
    """The cluster cannot be reached now."""


def load_ray() -> Any:
    """Return the module of Ray.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "A cluster needs Ray, on this machine and on all others, in the same version. Install it: pip install "
            f'"ray>={LEAST_VERSION}". On one machine, --workers needs nothing.'
        ) from error
    return ray


class Cluster:
    """A connection to a Ray cluster.

    Tasks are at Ray's hands: those whose worker or machine is lost are done again elsewhere. A worker process
    is used for task after task, so that it keeps the model that it has loaded.
    """

    def __init__(self, address: str, *, gpus: float, threads: int = 1, retries: int = 3) -> None:
        """
        Args:
            address: of the cluster, "auto" for the one that this machine belongs to, or "local" for one that
                is started here and ended with the work.
            gpus: what a task takes of the cards, which may be a fraction.
            threads: CPU cores that a task takes where it takes no card, and OMP_NUM_THREADS.
            retries: how often a task is done again whose worker was lost.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        self.ray = load_ray()
        self.connect(address)
        self.options = {
            "num_gpus": gpus,
            "num_cpus": 0 if gpus else threads,
            "max_retries": retries,
            "max_calls": 0,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        self.say_too_few(gpus)

    def connect(self, address: str) -> None:
        """Connect to a cluster.

        Raises:
            UserError: there is none, or it does not answer.
        """
        if self.ray.is_initialized():
            raise UserError("This process is connected to a Ray cluster already.")
        require_answer(address)
        options = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
        try:
            self.ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
            raise UserError(
                f"No Ray cluster at {address!r}: {str(error).splitlines()[0]} Start one on this machine with `ray "
                "start --head`, and on the others with `ray start --address=IP:6379`."
            ) from PassingError(str(error))

    def say_too_few(self, gpus: float) -> None:
        """Say if no machine has the cards that a task takes, so that it waits for one that has."""
        most = max(
            (node["Resources"].get("GPU", 0) for node in self.ray.nodes() if node["Alive"]),
            default=0,
        )
        if gpus > most:
            warnings.warn(
                f"Each job takes {gpus:g} cards, but no machine of the cluster has more than {most:g} now. Jobs "
                "wait until one joins; Ctrl-C ends the waiting.",
                Notice,
                stacklevel=3,
            )

    def map(
        self, work: Callable[[Any, Stop], Any], items: Iterable[Any], stop: Stop
    ) -> Iterator[tuple[Any, Any]]:
        remote = self.ray.remote(**self.options)(carry_out)
        left, told = iter(items), False
        at_work: dict[Any, Any] = {}
        while True:
            while not stop() and len(at_work) < AHEAD:
                item = next(left, self)
                if item is self:
                    break
                at_work[remote.remote(work, item)] = item
            if stop() and not told:
                told = True
                for reference in at_work:
                    self.ray.cancel(reference, force=False)
            if not at_work:
                return
            for reference in self.ready(list(at_work)):
                item = at_work.pop(reference)
                yield item, self.result(reference)

    def ready(self, references: list[Any]) -> list[Any]:
        """Return those that are finished, after waiting a moment for one."""
        first, _ = self.ray.wait(references, num_returns=1, timeout=WAIT_SECONDS)
        if not first:
            return []
        found, _ = self.ray.wait(references, num_returns=len(references), timeout=0)
        return list(found)

    def result(self, reference: Any) -> Any:
        """Return the result of a task, or that it is lost.

        Raises:
            UserError: the workers cannot carry out what they are given.
        """
        errors = self.ray.exceptions
        try:
            return self.ray.get(reference)
        except errors.TaskCancelledError:
            return Lost("it was stopped before it began")
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            raise UserError(
                f"A worker of the cluster cannot do the work: {last_line(error)} Install this package on all "
                "machines of the cluster, in the same version, for the Python that Ray runs on."
            ) from error
        except errors.RayError as error:
            return Lost(f"its worker or machine was lost ({type(error).__name__})")

    def close(self) -> None:
        """Leave the cluster; what is still at work is ended by Ray."""
        self.ray.shutdown()


def require_answer(address: str) -> None:
    """Refuse an address at which nobody answers, at once: Ray itself tries for many minutes.

    Raises:
        UserError: it is no address, or nothing answers there.
    """
    if address in ("auto", "local"):
        return
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(
            f"Bad --ray {address!r}. Expected auto, local, or the address of a cluster's head as HOST:PORT, such "
            "as 10.0.0.1:6379."
        )
    try:
        socket.create_connection((match[1], int(match[2])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"No Ray cluster at {address}: {error}. Start its head with `ray start --head --port={match[2]}`, and "
            "see that this machine reaches it."
        ) from PassingError(str(error))


def last_line(error: Exception) -> str:
    """Return the last line of an error of Ray, which has the worker's own error."""
    return str(error).strip().splitlines()[-1]


def carry_out(work: Callable[[Any, Stop], Any], item: Any) -> Any:
    """Work on one item in a worker of Ray, where being cancelled is a signal; it stops by itself then.

    A worker whose card does not answer any more says so once, and ends at its next task, which Ray then gives
    to another one.
    """
    if getattr(carry_out, "broken", False):
        os._exit(1)
    with stop_on_signal() as stop:
        result = work(item, stop)
    carry_out.broken = getattr(result, "fatal", False)  # type: ignore[attr-defined]
    return result
