"""The EM loop (VCD section 3): tokens under the masks, masks from the tokens' attention."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .concepts import ConceptPrompt, ConceptVectors
from .diffusion import DiffusionModel
from .e_step import e_step, gather, trained_under
from .errors import UserError
from .estimate import Estimate, average_maps, map_side, masks_from_maps
from .examples import stack_masks
from .m_step import m_step
from .masks import areas, iou, min_max
from .problem import Prepared, Problem
from .state import PictureState, RunState


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


def initialise(problem: Problem) -> RunState:
    """Start vectors from the concepts' words and, where the mode wants them, masks (VCD S0, S1)."""
    state = blank_state(problem)
    state.pictures = [
        first_masks(problem, p, state.vectors, state.generator) for p in problem.pictures
    ]
    return state


def resume(problem: Problem, path: Path) -> RunState:
    """The state in a file, ready to go on.

    Raises:
        UserError: the file is damaged or belongs to another run.
    """
    state = blank_state(problem)
    state.load(path)
    return state


def blank_state(problem: Problem) -> RunState:
    """Start vectors, their optimizer, and masks of the whole picture."""
    settings, host = problem.settings, problem.host
    g = torch.Generator().manual_seed(settings.seed)
    vectors = {
        concept.name: {
            encoder: nn.Parameter(v.detach().clone().float())
            for encoder, v in host.initial_vectors(concept.words, settings.vectors, g).items()
        }
        for concept in problem.concepts
    }
    parameters = [v for of in vectors.values() for v in of.values()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    pictures = [whole_picture(problem, prepared) for prepared in problem.pictures]
    return RunState(problem.key, vectors, optimizer, g, pictures)


def whole_picture(problem: Problem, prepared: Prepared) -> PictureState:
    """No maps yet, and masks that cover everything."""
    device, count = problem.host.device, len(prepared.names)
    maps = torch.zeros(count, *map_side(prepared.latent_size, problem.host.layers), device=device)
    masks = torch.ones(count, *prepared.size, device=device)
    counts = torch.zeros(count, device=device)
    return PictureState(maps, 0, torch.zeros_like(maps), counts, masks, masks > 0.5, counts)


def first_masks(
    problem: Problem, prepared: Prepared, vectors: ConceptVectors, g: torch.Generator
) -> PictureState:
    """Masks before any learning: the user's, those of the start vectors, or the whole picture."""
    settings, blank = problem.settings, whole_picture(problem, prepared)
    if settings.mode == "none":
        return blank
    if settings.mode == "given":
        labels = given_masks(prepared).to(problem.host.device)
        return replace(blank, masks=labels.float(), labels=labels)
    passes = settings.masks.init_timesteps
    maps, estimate = attention_masks(problem, prepared, vectors, passes, g)
    return replace(
        blank,
        maps=maps,
        rounds=1,
        masks=trained_under(estimate, settings),
        labels=estimate.masks,
        contrast=estimate.contrast,
    )


def given_masks(prepared: Prepared) -> Bool[Tensor, "k H W"]:
    """The user's masks.

    Raises:
        UserError: one is missing or empty: nothing can be learned under it.
    """
    labels = stack_masks(prepared.example.masks, prepared.names, prepared.size)
    empty = [name for name, m in zip(prepared.names, labels, strict=True) if not m.any()]
    if empty:
        raise UserError(
            f"The mask of {', '.join(empty)} is empty. Expected white where the concept is, in every "
            "picture whose prompt names it."
        )
    return labels


def known_vectors(
    host: DiffusionModel, prompt: ConceptPrompt, learned: ConceptVectors
) -> dict[str, dict[str, Tensor]]:
    """Vectors of the learned concepts, and of the words (one a piece) of the prompt's others.

    Raises:
        UserError: a concept of the prompt is neither learned nor has words.
    """
    vectors = {
        name: {encoder: v.to(host.device).float() for encoder, v in of.items()}
        for name, of in learned.items()
    }
    for concept in prompt.concepts:
        if concept.name in vectors:
            continue
        if not concept.words:
            raise UserError(
                f"Nothing is known of <{concept.name}>. Give words, as in <{concept.name}:dog>, or "
                "concepts that were learned."
            )
        vectors[concept.name] = dict(host.initial_vectors(concept.words, None, torch.Generator()))
    return vectors


def attention_masks(
    problem: Problem, prepared: Prepared, vectors: ConceptVectors, passes: int, g: torch.Generator
) -> tuple[Float[Tensor, "k h w"], Estimate]:
    """Mean maps of `passes` UNet passes with the given vectors, and the masks that they make (VCD S1)."""
    settings, host = problem.settings, problem.host
    with torch.no_grad():
        conditioning = host.encode_prompts([prepared.example.prompt], vectors)
    maps = min_max(
        average_maps(host, prepared.Z0, conditioning, prepared.names, passes, settings.masks, g)
    )
    return maps, masks_from_maps(maps, prepared.size, settings.masks, prepared.refine)


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
