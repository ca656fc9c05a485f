"""Whole short runs, for tests that look at their ends."""

from em_core.method.problem import Problem
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import finished, run
from em_core.settings import JointSettings

JOINT = JointSettings(steps=4, learning_rate=1e-3)


def finish(problem: Problem) -> tuple[RunState, ConceptSet]:
    """The last state of a run, and the concepts in it."""
    state = run(problem, initialise(problem))
    assert finished(problem, state)
    return state, conclude(problem, state)
