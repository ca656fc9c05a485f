"""Where a run starts (VCD S0 and S1): token vectors from words or at random, and the first masks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import UserError
from ..examples import stack_masks
from ..model.layers import finest_size
from ..model.protocol import DiffusionModel
from ..prompts import ConceptPrompt, ConceptVectors
from .maps import attention_masks
from .problem import Prepared, Problem
from .state import PictureState, RunState

# What a random start is judged by: passes per picture, and pictures per concept.
START_PASSES = 8
START_PICTURES = 2


def initialise(problem: Problem) -> RunState:
    """Start vectors from the concepts' words and, where the mode wants them, masks (VCD S0, S1)."""
    generator = torch.Generator().manual_seed(problem.settings.seed)
    vectors = choose_random_starts(problem, start_vectors(problem, generator), generator)
    pictures = tuple(first_masks(problem, p, vectors, generator) for p in problem.pictures)
    return RunState(vectors, generator.get_state(), pictures)


def start_vectors(problem: Problem, generator: torch.Generator) -> ConceptVectors:
    """Vectors from each concept's words, or one random draw."""
    host, count = problem.host, problem.settings.vectors
    return own_copies(
        {c.name: host.initial_vectors(c.words, count, generator) for c in problem.concepts}
    )


def own_copies(vectors: ConceptVectors) -> ConceptVectors:
    """The vectors in float32, in memory of their own."""
    return {
        concept: {encoder: v.detach().clone().float() for encoder, v in by_encoder.items()}
        for concept, by_encoder in vectors.items()
    }


@torch.no_grad()
def choose_random_starts(
    problem: Problem, vectors: ConceptVectors, generator: torch.Generator
) -> ConceptVectors:
    """Give concepts without words the best of several random draws; see `EMSettings.random_starts`.

    A start from which a token attends to the background or to another concept's object is rarely
    left by the loop. Its mask has little contrast, so the draw wins whose weakest mask has the most,
    in the first pictures of each such concept. All draws see the same noise.
    """
    settings, host = problem.settings, problem.host
    wordless = [concept.name for concept in problem.concepts if not concept.words]
    if not wordless or settings.random_starts == 1 or settings.mode in ("given", "none"):
        return vectors
    pictures = [
        prepared
        for i, prepared in enumerate(problem.pictures)
        if any(i in pictures_of(problem, name)[:START_PICTURES] for name in wordless)
    ]
    noise = generator.get_state()
    draws: list[ConceptVectors] = [{name: vectors[name] for name in wordless}]
    for _ in range(settings.random_starts - 1):
        draws.append(
            {name: host.initial_vectors("", settings.vectors, generator) for name in wordless}
        )
    scores = []
    for draw in draws:
        same = torch.Generator()
        same.set_state(noise)
        scores.append(weakest_contrast(problem, pictures, {**vectors, **draw}, same))
    best = draws[max(range(len(draws)), key=scores.__getitem__)]
    return {**vectors, **own_copies(best)}


def pictures_of(problem: Problem, name: str) -> list[int]:
    """Indices of the pictures whose prompts name a concept."""
    return [i for i, prepared in enumerate(problem.pictures) if name in prepared.names]


def weakest_contrast(
    problem: Problem,
    pictures: Sequence[Prepared],
    vectors: ConceptVectors,
    generator: torch.Generator,
) -> float:
    """The least contrast of the masks that these vectors give, over concepts and pictures."""
    masks = problem.settings.masks
    estimates = [
        attention_masks(problem.host, prepared, vectors, masks, START_PASSES, generator)[1]
        for prepared in pictures
    ]
    return min(float(estimate.contrast.min()) for estimate in estimates)


def whole_picture(prepared: Prepared) -> PictureState:
    """No maps yet, and masks that cover everything."""
    device, count = prepared.Z0.device, len(prepared.names)
    maps = torch.zeros(count, *finest_size(prepared.layers), device=device)
    masks = torch.ones(count, *prepared.size, device=device)
    none = torch.zeros(count, device=device)
    return PictureState(maps, torch.zeros_like(maps), none, masks, masks > 0.5, none)


def first_masks(
    problem: Problem, prepared: Prepared, vectors: ConceptVectors, generator: torch.Generator
) -> PictureState:
    """Masks before any learning: the user's, those of the start vectors, or the whole picture."""
    settings, blank = problem.settings, whole_picture(prepared)
    if settings.mode == "none":
        return blank
    if settings.mode == "given":
        labels = given_masks(prepared).to(problem.host.device)
        return replace(blank, masks=labels.float(), labels=labels)
    passes = settings.masks.init_timesteps
    maps, estimate = attention_masks(
        problem.host, prepared, vectors, settings.masks, passes, generator
    )
    return replace(
        blank,
        maps=maps,
        masks=estimate.weights(settings.masks.soft),
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
    host: DiffusionModel, prompt: ConceptPrompt, known: ConceptVectors
) -> ConceptVectors:
    """Vectors of the learned concepts, and of the words (one a piece) of the prompt's others.

    Raises:
        UserError: a concept of the prompt is neither learned nor has words.
    """
    vectors = {
        name: {encoder: v.to(host.device).float() for encoder, v in by_encoder.items()}
        for name, by_encoder in known.items()
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
