"""Drive a run to its end: its phases, listeners, saving, and stopping on request."""

import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from ..errors import StoreWarning, UserError
from ..method.joint import learn_joint
from ..method.loop import Step, StepEvent, learn
from ..method.problem import Problem
from ..method.state import RunState
from ..method.visual import learn_visual
from .state_file import StateFile

Listener = Callable[[StepEvent, RunState], None]
SAVE_SECONDS = 20.0
SAVE_SHARE = 10  # at most a tenth of the time is spent on writing a large state


@dataclass
class Saving:
    """Saves a run's state now and then; a save that fails warns, and the run goes on.

    Attributes:
        file: where the state is saved; None saves nothing.
    """

    file: StateFile | None
    at: float = field(default_factory=time.monotonic)
    took: float = 0.0
    failing: bool = False

    def due(self) -> bool:
        """Return whether it is time to save: every 20 seconds, less often if writing takes long."""
        return time.monotonic() - self.at > max(SAVE_SECONDS, SAVE_SHARE * self.took)

    def save(self, state: RunState) -> None:
        """Save the state; warn of the first failure, and again once a save has worked in between."""
        if self.file is None:
            return
        began = time.monotonic()
        try:
            self.file.save(state)
        except UserError as error:
            if not self.failing:
                warnings.warn(
                    f"The state of the run was not saved, but it goes on. Stopped now, it would go on from its "
                    f"last saved step, if there is one. {error}",
                    StoreWarning,
                    stacklevel=3,
                )
            self.failing = True
        else:
            self.failing = False
        self.at = time.monotonic()
        self.took = self.at - began


def steps(problem: Problem, start: RunState) -> Generator[Step, None, None]:
    """Run what is left of all phases; yields each step's event and state."""
    state = start
    for event, after in learn(problem, start):
        state = after
        yield event, state
    yield from learn_joint(problem, state)
    yield from learn_visual(problem, state)


def finished(problem: Problem, state: RunState) -> bool:
    """Return whether nothing is left to do."""
    joint, visual = problem.joint, problem.visual
    if visual is not None:
        return state.phase == "visual" and state.step >= visual.steps
    if joint.kind == "none":
        return state.step >= problem.settings.steps
    return state.phase == "joint" and state.step >= joint.steps


def run(
    problem: Problem,
    state: RunState,
    listeners: Sequence[Listener] = (),
    file: StateFile | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> RunState:
    """Run what is left of all phases, or until `stop` returns True, and return the last state.

    The state is saved to `file` every 20 seconds (less often if writing takes long), before the phase after
    the EM loop, and when the run stops for whatever reason: each step happens completely or not at all. Where
    it cannot be saved there is a StoreWarning.

    Raises:
        TrainingError: a loss is not finite; the last good state is in `file`.
    """
    saving, left = Saving(file), steps(problem, state)
    try:
        for event, state in left:
            for listen in listeners:
                listen(event, state)
            if stop():
                break
            another = problem.joint.kind != "none" or problem.visual is not None
            ends = event.phase == "em" and event.step == event.steps and another
            if ends or saving.due():
                saving.save(state)
    except KeyboardInterrupt:
        raise  # it may come in the middle of the optimizer's step: what was saved before stays
    except BaseException:  # in newer versions, ComfyUI's interrupt is not an Exception
        saving.save(state)
        raise
    finally:
        left.close()
    if not finished(problem, state):
        saving.save(state)
    return state


class StopRequest:
    """A `stop` for :func:`run`, which a signal sets.

    Attributes:
        status: exit status of a process that was stopped so: 130 by Ctrl-C, 75 (EX_TEMPFAIL) by a termination
            request, which schedulers send to what they will start again.
    """

    def __init__(self) -> None:
        self.asked = False
        self.status = 130

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Ask to stop; at the second time, end at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.status = 75 if number == signal.SIGTERM else 130


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Provide a `stop` for :func:`run` that Ctrl-C or a termination request sets.

    The first signal asks the run to end after its current step; a second one ends it at once.
    """
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.ask) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
