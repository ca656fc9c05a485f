"""Drive a run to its end: both phases, listeners, saving, and stopping on request."""

import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..method.joint import learn_joint
from ..method.loop import Step, StepEvent, learn
from ..method.problem import Problem
from ..method.state import RunState
from .state_file import StateFile

Listener = Callable[[StepEvent, RunState], None]
SAVE_SECONDS = 20.0
SAVE_SHARE = 10  # at most a tenth of the time is spent on writing a large state


def steps(problem: Problem, start: RunState) -> Generator[Step, None, None]:
    """Run what is left of both phases; yields each step's event and state."""
    state = start
    for event, after in learn(problem, start):
        state = after
        yield event, state
    yield from learn_joint(problem, state)


def finished(problem: Problem, state: RunState) -> bool:
    """Return whether nothing is left to do."""
    joint = problem.joint
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
    """Run what is left of both phases, or until `stop` returns True, and return the last state.

    The state is saved to `file` every 20 seconds (less often if writing takes long), before the joint
    phase, and when the run stops for whatever reason: each step happens completely or not at all.

    Raises:
        TrainingError: a loss is not finite; the last good state is in `file`.
    """
    saved, took = time.monotonic(), 0.0
    left = steps(problem, state)
    try:
        for event, state in left:
            for listen in listeners:
                listen(event, state)
            if stop():
                break
            now = time.monotonic()
            ends = (
                event.phase == "em" and event.step == event.steps and problem.joint.kind != "none"
            )
            if file and (ends or now - saved > max(SAVE_SECONDS, SAVE_SHARE * took)):
                file.save(state)
                saved = time.monotonic()
                took = saved - now
    except KeyboardInterrupt:
        raise  # it may come in the middle of the optimizer's step: what was saved before stays
    except BaseException:  # in newer versions, ComfyUI's interrupt is not an Exception
        if file:
            file.save(state)
        raise
    finally:
        left.close()
    if file and not finished(problem, state):
        file.save(state)
    return state


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Provide a `stop` for :func:`run` that Ctrl-C or a termination request sets.

    The first signal asks the run to end after its current step; a second one ends it at once.
    """
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
