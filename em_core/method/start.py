"""Where a run starts (VCD S0 and S1): token vectors from words or at random, and the first masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import UserError
from ..examples import stack_masks
from ..masks.estimate import Estimate, left_to_right, masks_among, masks_from_maps
from ..masks.regions import (
    LEAST_CELLS,
    Regions,
    best_assignment,
    evidence,
    find_regions,
    margin,
    with_spots,
    without_islands,
)
from ..masks.resizing import resize
from ..masks.settings import MaskSettings
from ..masks.thresholds import min_max
from ..model.layers import finest_size
from ..model.protocol import DiffusionModel
from ..prompts import ConceptPrompt, ConceptVectors
from .maps import read_attention
from .presence import missed_regions, naming, presence, unseen, who_is_there
from .problem import Prepared, Problem
from .state import PictureState, RunState, generator_at

CLEAR = 1.25
"""By how much, in the logarithm of the evidence, the best way to give the concepts their regions must surpass
all others for the model's error not to be asked."""


def initialise(problem: Problem) -> RunState:
    """Start vectors from the concepts' words and, where the mode wants them, masks (VCD S0, S1).

    Raises:
        UserError: no concept was found in any picture.
    """
    generator = torch.Generator().manual_seed(problem.settings.seed)
    vectors = start_vectors(problem, generator)
    pictures = [first_masks(problem, p, vectors, generator) for p in problem.pictures]
    pictures = like_the_first(problem, pictures)
    if not any(bool(picture.found.any()) for picture in pictures):
        raise UserError(
            f"None of {', '.join(c.name for c in problem.concepts)} was found in the pictures. Give "
            "words that say what is to be seen, as in <rex:dog>, or give masks of your own (mode 'given')."
        )
    phase = "em" if problem.has_em else "visual"
    return RunState(vectors, generator.get_state(), tuple(pictures), phase=phase)


def start_vectors(problem: Problem, generator: torch.Generator) -> ConceptVectors:
    """Vectors of known concepts, else from their words, or from the settings' generic word where they
    have none."""
    host, settings = problem.host, problem.settings
    started = {}
    for c in problem.concepts:
        if c.name in problem.known:
            started[c.name] = {e: v.to(host.device) for e, v in problem.known[c.name].items()}
        else:
            words = c.words or settings.generic_word
            started[c.name] = host.initial_vectors(words, settings.vectors, generator)
    return own_copies(started)


def alike_concepts(words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Groups of two or more concepts that start from the same words, as indices in order.

    Concepts without words are alike too.
    """
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(words):
        groups.setdefault(text.lower(), []).append(index)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def own_copies(vectors: ConceptVectors) -> ConceptVectors:
    """The vectors in float32, in memory of their own."""
    return {
        concept: {encoder: v.detach().clone().float() for encoder, v in by_encoder.items()}
        for concept, by_encoder in vectors.items()
    }


def whole_picture(prepared: Prepared) -> PictureState:
    """No maps yet, and masks that cover everything."""
    device, count = prepared.Z0.device, len(prepared.names)
    maps = torch.zeros(count, *finest_size(prepared.layers), device=device)
    masks = torch.ones(count, *prepared.size, device=device)
    every = torch.ones(count, dtype=torch.bool)
    none = torch.zeros(count, device=device)
    return PictureState(maps, torch.zeros_like(maps), none, masks, masks > 0.5, every)


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
    by_name = problem.looks()
    alike = alike_concepts([by_name[name] for name in prepared.names])
    found = masks_of_vectors(
        problem.host, prepared, vectors, settings.masks, alike, generator, settings.generic_word
    )
    estimate = found.estimate
    return replace(
        blank,
        maps=found.maps,
        masks=estimate.weights(settings.masks.soft),
        labels=estimate.masks,
        found=estimate.believed(settings.masks.guards),
        regions=found.regions,
        named=found.named,
        told=found.told,
        doubtful=found.doubtful,
        first=found.maps,
    )


@dataclass(frozen=True)
class FirstMasks:
    """What vectors find in a picture.

    Attributes:
        maps: [k, h, w] attention maps, each scaled to 0..1.
        estimate: the masks that they make.
        regions: [h, w] the picture's regions; None where they are not looked for.
        named: [k, r] what the model's error says of them; None where it was not asked.
        told: the same where the maps are unclear; None where they are clear.
        doubtful: [k] whether the model sees a concept nowhere in the picture, whatever its mask, see
            :func:`em_core.method.presence.unseen`; on the CPU, False where it was not asked.
    """

    maps: Float[Tensor, "k _h _w"]
    estimate: Estimate
    regions: Int[Tensor, "_h _w"] | None
    named: Float[Tensor, "k r"] | None
    told: Float[Tensor, "k r"] | None
    doubtful: Bool[Tensor, " k"]


def masks_of_vectors(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    settings: MaskSettings,
    alike: tuple[tuple[int, ...], ...],
    generator: torch.Generator,
    generic_word: str = "",
) -> FirstMasks:
    """Masks from nothing but the attention of given vectors (VCD S1).

    Where some concepts are not found, others may have been given what is theirs: the concepts that the
    picture shows least are left out, and the rest share what there is.

    Args:
        alike: concepts whose vectors are the same, as indices in the prompt's order; they are given
            their regions from left to right.
        generic_word: a word that fits any thing, which the others are measured against where the
            model's error is asked which concepts the picture shows, and where; "" does not ask.
    """
    passes, limit = settings.init_timesteps, settings.regions
    reading = read_attention(
        host, prepared, vectors, settings, passes, generator, regions=limit is not None
    )
    labels = None
    if limit is not None and reading.affinity is not None:
        labels = find_regions(reading.affinity, prepared.self_layers[0].size, limit)
        labels = without_islands(labels)
    maps = min_max(reading.maps)
    if labels is not None:
        maps = maps.clone()
        for group in alike:
            maps[list(group)] = min_max(maps[list(group)].mean(dim=0))
        labels = with_spots(labels, maps)
    regions = None if labels is None else Regions(labels, alike)
    named, doubtful = None, torch.zeros(len(maps), dtype=torch.bool)
    if regions is not None and generic_word and settings.naming_passes:
        unclear, members = in_doubt(min_max(maps, settings.peak), regions), regions.members
        # Where maps are clear, what follows has the same random numbers as if nothing had been asked.
        source = generator if unclear else generator_at(generator.get_state())
        missed = missed_regions(
            host, prepared, vectors, generic_word, settings, members, alike, source
        )
        doubtful = unseen(missed, members.sum(dim=(1, 2)) >= LEAST_CELLS)
        named = naming(missed)
        regions = replace(regions, told=named) if unclear else regions
    estimate = masks_from_maps(maps, prepared.size, settings, prepared.refine, regions)
    missing = (~estimate.believed(settings.guards)).nonzero().flatten().tolist()
    if generic_word and settings.presence_passes and 0 < len(missing) < len(maps):
        present = presence(
            host, prepared, vectors, generic_word, settings.presence_passes, generator
        )
        there = who_is_there(present, missing)
        if there is not None and not only_alike(missing, there, alike):
            among = masks_among(there, maps, prepared.size, settings, prepared.refine, regions)
            estimate = among if among.believed(settings.guards)[there].all() else estimate
    if regions is not None:
        estimate = left_to_right(estimate, alike)
    told = None if regions is None else regions.told
    return FirstMasks(maps, estimate, labels, named, told, doubtful)


def in_doubt(maps: Float[Tensor, "k _h _w"], regions: Regions) -> bool:
    """Whether maps, scaled to 0..1, do not tell clearly which concept each region belongs to."""
    return margin(evidence(maps, regions.members), regions.members, regions.alike) < CLEAR


def only_alike(
    missing: Sequence[int], there: Sequence[int], alike: Sequence[Sequence[int]]
) -> bool:
    """Whether each of the missing is there and only changes places with another of its words.

    Which of two concepts of one word is absent is not for the model to say.
    """
    return all(
        index in there and any(index in group and not {*group} <= {*there} for group in alike)
        for index in missing
    )


def like_the_first(problem: Problem, pictures: Sequence[PictureState]) -> list[PictureState]:
    """Pictures in which concepts that are alike have the masks that look as in the first picture.

    Left and right say which is which in the first picture that names two of them; in the next,
    the colours do: the mean latents under the masks.
    """
    settings, after = problem.settings, list(pictures)
    if settings.mode not in ("em", "fixed"):
        return after
    words = problem.looks()
    names = list(words)
    for group in alike_concepts(list(words.values())):
        looks: dict[str, Tensor] = {}
        for index, prepared in enumerate(problem.pictures):
            here = [n for n in prepared.names if n in {names[i] for i in group}]
            rows = [prepared.names.index(name) for name in here]
            means = mean_latents(prepared, after[index].masks[rows])
            known = [i for i, name in enumerate(here) if name in looks]
            if len(known) > 1:
                old = torch.stack([looks[here[i]] for i in known])
                order = best_assignment(-torch.cdist(old, means[known]))
                taken = [rows[known[i]] for i in order]
                after[index] = reordered(after[index], [rows[i] for i in known], taken)
                means = mean_latents(prepared, after[index].masks[rows])
            looks |= {n: m for n, m in zip(here, means, strict=True) if n not in looks}
    return after


def mean_latents(prepared: Prepared, masks: Float[Tensor, "k H W"]) -> Float[Tensor, "k c"]:
    """Mean latent under each mask."""
    Z0 = prepared.Z0[0]
    small = resize(masks, (Z0.shape[-2], Z0.shape[-1]), "mask").flatten(1)
    return small @ Z0.flatten(1).T / small.sum(dim=1, keepdim=True).clamp(min=1e-6)


def reordered(picture: PictureState, rows: Sequence[int], taken: Sequence[int]) -> PictureState:
    """The picture with the masks of concepts `rows` replaced by those of concepts `taken`."""
    order = list(range(len(picture.masks)))
    for row, other in zip(rows, taken, strict=True):
        order[row] = other
    return replace(
        picture,
        masks=picture.masks[order],
        labels=picture.labels[order],
        found=picture.found[order],
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
