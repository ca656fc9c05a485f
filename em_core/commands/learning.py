"""A run of `python -m em_core learn`, on what fits the memory."""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..examples import Example
from ..hosts.diffusers import DiffusersHost
from ..hosts.planned import Fitting
from ..method.problem import prepare
from ..method.start import initialise
from ..method.state import RunState
from ..model.jobs import Work
from ..runs.concept_set import ConceptSet
from ..runs.finding import discover
from ..runs.key import run_key
from ..runs.runner import finished, run, stop_on_signal
from ..runs.state_file import StateFile
from ..runs.truth import truth_digest
from .common import Progress
from .results import summary, write_results
from .writing import say, written

DISCOVER = "discover"


@dataclass
class Learning:
    """A run of the command; where memory runs out, the next attempt goes on from its last step.

    Attributes:
        args: the command's options.
        model: digest of the model.
        known: concepts that it starts from.
        file: where its state is kept.
        made_from: digests of what it is made from.
        found: what was discovered.
        started: when it began.
    """

    args: argparse.Namespace
    model: str
    known: ConceptSet | None
    file: Path
    made_from: Mapping[str, str]
    found: list[Example] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __call__(self, fitting: Fitting) -> int:
        """Learn with what fits the memory, and return the command's exit status."""
        host, work, known, out = fitting.host, fitting.work, self.known, self.args.out
        examples = work.examples
        if self.args.mode == DISCOVER:
            examples = self.found = self.found or self.discovered(host, work)
        settings = work.em, work.joint, work.visual
        key = run_key(self.model, examples, *settings, known)
        file = StateFile(self.file, key, truth_digest(examples))
        problem = prepare(host, examples, *settings, known.vectors if known else None)
        progress = Progress(self.args.quiet)
        weights = (known.weights, known.lora_scale) if known else ({}, 1.0)
        with stop_on_signal() as stop, host.applied(*weights):
            state = file.load(host.device) if file.exists() else initialise(problem)
            file.save(state)
            state = run(problem, state, [progress], file, stop)
        progress.close()
        if not finished(problem, state):
            say_stopped(file, state)
            return stop.status
        seconds = time.monotonic() - self.started
        names = write_results(problem, state, out, seconds, self.made_from, known)
        file.remove()
        say(self.args, *summary(problem, state), written(out, names))
        return 0

    def discovered(self, host: DiffusersHost, work: Work) -> list[Example]:
        """Return the picture with the prompt that names what is in it."""
        picture = work.examples[0].picture
        return [Example(picture, discover(host, picture, work.em, self.args.seed)[0])]


def say_stopped(file: StateFile, state: RunState) -> None:
    """Say how to continue."""
    way = "To continue, add --resume to the same command."
    if not file.holds(state):
        way = (
            f"This step could not be saved in {file.path.parent}; --resume continues from the last one "
            "that was."
        )
    sys.stderr.write(f"Stopped at step {state.step}. {way}\n")
