"""Runs that take the first memory plan that fits, and go on with a smaller one if memory runs out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar, runtime_checkable

from ..errors import UserError
from ..model.jobs import Work
from ..model.memory import describe
from ..model.plans import Attempt, first_that_fits, smaller
from .store import RunStore

Result = TypeVar("Result")


@runtime_checkable
class DeviceMemory(Protocol):
    """The memory of the device that a model runs on, as its host knows it."""

    def free(self) -> float:
        """Return how many bytes are free."""

    def make_room(self) -> None:
        """Free all that is not in use."""

    def ran_out(self, error: Exception) -> bool:
        """Return whether an error says that there was no more."""


def within_memory(
    tries: Sequence[Attempt],
    learn: Callable[[Attempt], Result],
    memory: DeviceMemory,
    work: Work,
    family: str,
    say: Callable[[str], None],
) -> Result:
    """Learn with the first attempt that fits what is free and, if memory runs out all the same, with
    the next smaller one.

    Args:
        tries: the attempts, in the order in which they are preferred.
        learn: carries an attempt out; it goes on from the last step that was saved.
        memory: of the device.
        work, family: what is learned, on which family of models.
        say: tells people what was chosen and what it needs, at each attempt.

    Raises:
        UserError: memory runs out with every attempt.
    """
    left = list(tries[first_that_fits(tries, memory.free()) :])
    while left:
        attempt = left[0]
        say(choice(attempt, memory.free(), work, family))
        try:
            return learn(attempt)
        except Exception as error:
            if not memory.ran_out(error):
                raise
            logging.warning("Out of memory with the plan %s (%s).", attempt.plan.name, error)
        # Outside the handler, since the error holds the frames that hold the tensors.
        memory.make_room()
        left = smaller(left, attempt)
    raise UserError(
        f"Not enough memory to learn, even with the plan {attempt.plan.name} and {attempt.batch} sample "
        "per step. The model has been unloaded. Learn at a smaller size, close other programs that use "
        "the graphics card, or learn tokens alone."
    )


def choice(attempt: Attempt, free: float, work: Work, family: str) -> str:
    """What was chosen, what it needs, and what else follows from it, for people."""
    need = attempt.need.device
    text = f"{describe(work.describe(family), need, free)} (memory plan {attempt.plan.name})."
    if attempt.batch < work.batch:
        text += f" Samples per step: {attempt.batch} instead of {work.batch}."
    if need > free:
        text += " This may not suffice; a smaller learning size needs less."
    return text


@contextmanager
def kept_for_now(store: RunStore | None) -> Iterator[RunStore]:
    """Provide the store or, for a run that is not remembered, one that is gone when the context ends:
    where memory runs out, the next attempt goes on from the last step."""
    if store is not None:
        yield store
        return
    with TemporaryDirectory() as folder:
        yield RunStore(folder)
