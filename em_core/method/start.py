"""Where a run starts (VCD S0 and S1): token vectors from words or at random, and the first masks."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import UserError
from ..examples import stack_masks
from ..masks.estimate import Estimate, masks_from_maps
from ..masks.thresholds import min_max
from ..model.layers import map_side
from ..model.protocol import DiffusionModel
from ..prompts import ConceptPrompt, ConceptVectors
from .e_step import trained_under
from .maps import average_maps
from .problem import Prepared, Problem
from .state import PictureState, RunState

# What a random start is judged by: passes per picture, and pictures per concept.
START_PASSES = 8
START_PICTURES = 2


def initialise(problem: Problem) -> RunState:
    """Start vectors from the concepts' words and, where the mode wants them, masks (VCD S0, S1)."""
    state = blank_state(problem)
    choose_random_starts(problem, state)
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


@torch.no_grad()
def choose_random_starts(problem: Problem, state: RunState) -> None:
    """Give concepts without words the best of several random draws; see `EMSettings.random_starts`.

    A start from which a token attends to the background or to another concept's object is rarely
    left by the loop. Its mask has little contrast, so the draw wins whose weakest mask has the most,
    in the first pictures of each such concept. All draws see the same noise.
    """
    settings, host, g = problem.settings, problem.host, state.generator
    wordless = [concept.name for concept in problem.concepts if not concept.words]
    if not wordless or settings.random_starts == 1 or settings.mode in ("given", "none"):
        return
    pictures = [
        prepared
        for i, prepared in enumerate(problem.pictures)
        if any(i in pictures_of(problem, name)[:START_PICTURES] for name in wordless)
    ]
    noise = g.get_state()
    draws: list[ConceptVectors] = [{name: state.vectors[name] for name in wordless}]
    for _ in range(settings.random_starts - 1):
        draws.append({n: host.initial_vectors("", settings.vectors, g) for n in wordless})
    scores = []
    for draw in draws:
        same = torch.Generator()
        same.set_state(noise)
        scores.append(weakest_contrast(problem, pictures, {**state.vectors, **draw}, same))
    best = draws[max(range(len(draws)), key=scores.__getitem__)]
    for name, of in best.items():
        for encoder, v in of.items():
            state.vectors[name][encoder].copy_(v)


def pictures_of(problem: Problem, name: str) -> list[int]:
    """Indices of the pictures whose prompts name a concept."""
    return [i for i, prepared in enumerate(problem.pictures) if name in prepared.names]


def weakest_contrast(
    problem: Problem, pictures: Sequence[Prepared], vectors: ConceptVectors, g: torch.Generator
) -> float:
    """The least contrast of the masks that these vectors give, over concepts and pictures."""
    return min(
        float(attention_masks(problem, prepared, vectors, START_PASSES, g)[1].contrast.min())
        for prepared in pictures
    )


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
