"""Drive a run to its end: both phases, listeners, saving, stopping on request."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import FrameType

from ..errors import TrainingError
from ..method.joint import learn_joint
from ..method.loop import StepEvent, learn
from ..method.problem import Problem
from ..method.state import RunState

Listener = Callable[[StepEvent, RunState], None]
SAVE_SECONDS = 20.0
SAVE_SHARE = 10  # a large state: at most a tenth of the time goes into writing it


def run(
    problem: Problem,
    state: RunState,
    listeners: Sequence[Listener] = (),
    state_file: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Run what is left of both phases; True when all is done, False when `stop` asked to end.

    The state goes to `state_file` every 20 seconds (less often where writing takes long), before the
    joint phase, when stopped, and when training fails.

    Raises:
        TrainingError: a loss is not finite; the last good state is in `state_file`.
    """
    saved, took = time.monotonic(), 0.0
    try:
        for event in chain(learn(problem, state), learn_joint(problem, state)):
            for listen in listeners:
                listen(event, state)
            if stop():
                save(state, state_file)
                return False
            now = time.monotonic()
            ends = event.phase == "em" and state.finished and problem.joint.kind != "none"
            if ends or now - saved > max(SAVE_SECONDS, SAVE_SHARE * took):
                save(state, state_file)
                saved = time.monotonic()
                took = saved - now
    except TrainingError:
        save(state, state_file)
        raise
    return True


def save(state: RunState, state_file: Path | None) -> None:
    """Write the state where a file is asked for."""
    if state_file is not None:
        state.to_file(state_file)


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
