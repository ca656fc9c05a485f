"""The EM loop (VCD section 3): tokens under the masks, masks from the tokens' attention."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.measures import areas, iou
from .e_step import e_step, gather
from .m_step import m_step
from .problem import Problem
from .state import RunState


@dataclass(frozen=True)
class StepEvent:
    """What a listener learns of one step; the masks themselves are in the state.

    Attributes:
        phase: "start" (masks just estimated, nothing learned), "em" or "joint".
        step, steps: done, and of how many.
        losses: name -> value of this step (empty at the start).
        masks: whether the masks were estimated at this step.
        iou, area, change: concept -> value of its masks, mean over pictures; where `masks` is set.
    """

    phase: str
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    masks: bool = False
    iou: Mapping[str, float] = field(default_factory=dict)
    area: Mapping[str, float] = field(default_factory=dict)
    change: Mapping[str, float] = field(default_factory=dict)


def learn(problem: Problem, state: RunState) -> Iterator[StepEvent]:
    """Run the EM loop from wherever `state` stands; changes `state`, yields an event per step.

    Between two events the state is whole: it can be saved, and a run that goes on from the file
    gives the same as one that never stopped.

    Raises:
        TrainingError: a loss is not finite.
    """
    settings = problem.settings
    if state.phase == "em" and state.step == 0:
        state.curves.clear()
        yield masks_event(problem, state, None)
    while state.phase == "em" and not state.finished:
        event = em_step(problem, state)
        state.finished = state.finished or state.step >= settings.steps
        yield event


def em_step(problem: Problem, state: RunState) -> StepEvent:
    """One M-step, and the E-step where it is due."""
    settings = problem.settings
    drawn, terms, maps = m_step(problem, state)
    state.step += 1
    losses = {name: float(value.detach()) for name, value in terms.items()}
    state.log(state.step, {f"loss/{name}": value for name, value in losses.items()})
    if settings.mode != "em":
        return StepEvent("em", state.step, settings.steps, losses)
    if settings.free_statistics:
        gather(problem, state, drawn, maps)
    if state.step % settings.e_step_every and state.step < settings.steps:
        return StepEvent("em", state.step, settings.steps, losses)
    before = e_step(problem, state)
    event = masks_event(problem, state, before, losses)
    note_settled(problem, state, event)
    return event


def note_settled(problem: Problem, state: RunState, event: StepEvent) -> None:
    """Count quiet E-steps; finish early where the settings ask for it."""
    settings = problem.settings
    quiet = max(event.change.values()) < settings.settled
    state.settled = state.settled + 1 if quiet else 0
    state.finished = bool(settings.patience) and state.settled >= settings.patience


def masks_event(
    problem: Problem,
    state: RunState,
    before: Sequence[Bool[Tensor, "_ _ _"]] | None,
    losses: Mapping[str, float] | None = None,
) -> StepEvent:
    """The event of newly estimated masks; its numbers go to the curves too."""
    if problem.settings.mode == "none":
        return StepEvent("start", 0, problem.settings.steps)
    pairs = list(zip(problem.pictures, state.pictures, strict=True))
    area = [named(p.names, areas(s.labels)) for p, s in pairs]
    truth = [
        named(
            list(p.truth),
            torch.stack([iou(s.labels[p.names.index(n)], m) for n, m in p.truth.items()]),
        )
        for p, s in pairs
        if p.truth
    ]
    change = [
        named(p.names, 1 - iou(s.labels, old))
        for (p, s), old in zip(pairs, before or [], strict=before is not None)
    ]
    measured = {"iou": mean_of(truth), "area": mean_of(area), "change": mean_of(change)}
    for what, values in measured.items():
        state.log(state.step, {f"{what}/{name}": value for name, value in values.items()})
    phase = "start" if before is None else "em"
    return StepEvent(
        phase, state.step, problem.settings.steps, losses or {}, masks=True, **measured
    )


def named(names: Sequence[str], values: Float[Tensor, " k"]) -> dict[str, float]:
    """Concept name -> value."""
    return dict(zip(names, values.tolist(), strict=True))


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each concept's values over the pictures that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean([row[name] for row in rows if name in row]) for name in names}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
