"""Drive a run to its end: both phases, listeners, saving, stopping on request."""

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
SAVE_SHARE = 10  # a large state: at most a tenth of the time goes into writing it


def steps(problem: Problem, start: RunState) -> Generator[Step, None, None]:
    """What is left of both phases, step by step."""
    state = start
    for event, after in learn(problem, start):
        state = after
        yield event, state
    yield from learn_joint(problem, state)


def finished(problem: Problem, state: RunState) -> bool:
    """Whether nothing is left to do."""
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
    """Run what is left of both phases, or until `stop` asks to end; gives the last state.

    The state goes to `file` every 20 seconds (less often where writing takes long), before the
    joint phase, and when the run stops for whatever reason: every step is whole or did not happen.

    Raises:
        TrainingError: a loss is not finite; the last good state is in `file`.
    """
    saved, took, moved = time.monotonic(), 0.0, False
    left = steps(problem, state)
    try:
        for event, state in left:
            moved = True
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
    except BaseException:  # an interrupt of ComfyUI is no Exception in its newer versions
        if file and moved:
            file.save(state)
        raise
    finally:
        left.close()
    if file and not finished(problem, state):
        file.save(state)
    return state


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or a termination request asks the run to end after its step; a second one ends it at once."""
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
