"""The EM loop (VCD section 3): tokens under the masks, masks from the tokens' attention."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.measures import areas, iou
from ..settings import EMSettings
from .e_step import e_step, with_free_statistics
from .m_step import m_step
from .optimizer import with_fitting_scale
from .problem import Problem
from .state import RunState


@dataclass(frozen=True)
class StepEvent:
    """What a listener learns of one step; the masks themselves are in the state.

    Attributes:
        phase: "start" (masks just estimated, nothing learned), "em", "joint" or "visual".
        step, steps: done, and of how many.
        losses: name -> value of this step (empty at the start).
        masks: whether the masks were estimated at this step.
        iou, area, change: concept -> value of its masks, mean over pictures; where `masks` is set.
        missing: concept -> numbers, from 1, of the pictures that name it and in which nothing was
            found that could be learned from; where `masks` is set.
        doubtful: the same for masks whose concept the model saw nowhere at the start.
    """

    phase: str
    step: int
    steps: int
    losses: Mapping[str, float] = field(default_factory=dict)
    masks: bool = False
    iou: Mapping[str, float] = field(default_factory=dict)
    area: Mapping[str, float] = field(default_factory=dict)
    change: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    doubtful: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def points(self) -> dict[str, float]:
        """Curve name -> this step's value."""
        loss = {"joint": "joint_loss", "visual": "visual_loss"}.get(self.phase, "loss")
        parts = {loss: self.losses, "iou": self.iou, "area": self.area, "change": self.change}
        return {
            f"{what}/{name}": value
            for what, values in parts.items()
            for name, value in values.items()
        }


Step = tuple[StepEvent, RunState]


def learn(problem: Problem, state: RunState) -> Iterator[Step]:
    """Run the EM loop from wherever `state` stands; yields each step's event and its new state.

    A run that goes on from any of these states gives the same as one that never stopped.

    Raises:
        TrainingError: a loss is not finite.
    """
    if state.phase == "em" and state.step == 0:
        event, state = recorded(replace(state, curves={}), start_event(problem, state))
        yield event, state
    first = True
    while state.phase == "em" and state.step < problem.settings.steps:
        event, state = em_step(problem, state, first)
        first = False
        yield event, state


def em_step(problem: Problem, state: RunState, first: bool = False) -> Step:
    """One M-step, and the E-step where it is due."""
    settings = problem.settings
    taken = partial(m_step, problem, state, first)
    state, drawn, losses, maps = with_fitting_scale(problem.host, taken)
    event = StepEvent("em", state.step, settings.steps, losses)
    if settings.mode == "em":
        if settings.free_statistics:
            state = with_free_statistics(problem, state, drawn, maps)
        if e_step_due(settings, state.step):
            before, state = state, e_step(problem, state)
            event = measured(event, problem, state, before)
    return recorded(state, event)


def e_step_due(settings: EMSettings, step: int) -> bool:
    """Whether an E-step follows M-step number `step`: at the last, and after each `e_step_every` at the
    full learning rate. Where rates fall, E-steps come as far apart as the tokens take to move as far."""
    full, every = settings.decay_after or settings.steps, settings.e_step_every

    def rounds(step: int) -> int:
        # The sum of the rates, as shares of the full one: that of (full / i)^2 over the steps i after `full`.
        return (step if step <= full else 2 * full - -(-full * full // step)) // every

    return step == settings.steps or rounds(step) > rounds(step - 1)


def recorded(state: RunState, event: StepEvent) -> Step:
    """The event, and the state with its values on the curves."""
    return event, state.with_points(event.points())


def start_event(problem: Problem, state: RunState) -> StepEvent:
    """The event of the first masks."""
    event = StepEvent("start", 0, problem.settings.steps)
    if problem.settings.mode == "none":
        return event
    return measured(event, problem, state)


def measured(
    event: StepEvent, problem: Problem, state: RunState, before: RunState | None = None
) -> StepEvent:
    """The event with IoU, area and change of new masks by concept, mean over the pictures."""
    pairs = list(zip(problem.pictures, state.pictures, strict=True))
    area = [by_name(p.names, areas(s.labels)) for p, s in pairs]
    truth = [
        by_name(
            list(p.truth),
            torch.stack([iou(s.labels[p.names.index(n)], m) for n, m in p.truth.items()]),
        )
        for p, s in pairs
        if p.truth
    ]
    change = [
        by_name(p.names, 1 - iou(s.labels, old.labels))
        for (p, s), old in zip(pairs, before.pictures if before else [], strict=before is not None)
    ]
    return replace(
        event,
        masks=True,
        iou=mean_of(truth),
        area=mean_of(area),
        change=mean_of(change),
        missing=not_found(problem, state),
        doubtful=not_seen(problem, state),
    )


def not_found(problem: Problem, state: RunState) -> dict[str, tuple[int, ...]]:
    """Concept -> numbers, from 1, of the pictures that name it and in which it has no mask."""
    return in_pictures(problem, [~picture.found for picture in state.pictures])


def not_seen(problem: Problem, state: RunState) -> dict[str, tuple[int, ...]]:
    """The same for those in which it has a mask, but the model saw it nowhere at the start."""
    nothing = [
        torch.zeros_like(p.found) if p.doubtful is None else p.doubtful for p in state.pictures
    ]
    return in_pictures(problem, [d & p.found for d, p in zip(nothing, state.pictures, strict=True)])


def in_pictures(
    problem: Problem, which: Sequence[Bool[Tensor, " _k"]]
) -> dict[str, tuple[int, ...]]:
    """Concept -> numbers, from 1, of the pictures in which something holds of it."""
    numbers: dict[str, tuple[int, ...]] = {}
    for number, (prepared, holds) in enumerate(zip(problem.pictures, which, strict=True), start=1):
        for name, so in zip(prepared.names, holds.tolist(), strict=True):
            if so:
                numbers[name] = (*numbers.get(name, ()), number)
    return numbers


def by_name(names: Sequence[str], values: Float[Tensor, " k"]) -> dict[str, float]:
    """Concept name -> value."""
    return dict(zip(names, values.tolist(), strict=True))


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each concept's values over the pictures that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean([row[name] for row in rows if name in row]) for name in names}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
