"""A whole evaluation: pictures for each prompt and seed, and every measure of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.resizing import resize
from ..pictures import Picture, from_image, to_image
from ..prompts import ConceptPrompt
from .crops import masked_crop
from .encoders import DINO, Instruments, Pictures
from .measures import among_references, detect_and_compare, pairwise, similarities
from .task import Task

AGREEMENT, FOUND, MIXED, COMPARED = "prompt_agreement", "found", "mixed", "detect_and_compare"
LPIPS, DINO_DIVERSITY = "lpips", "1_minus_dino"
THUMBNAIL = 96  # side of the crops that are kept for the report

Values = Mapping[tuple[str, str], float]
"""(measure, concept) -> value; the concept is "" for what is measured of a whole picture."""
Masks = Mapping[str, Bool[Tensor, "H W"]]
"""Concept -> its mask in a picture; empty where it was not found."""
Draw = Callable[[int, int], Picture]
"""From the number of a prompt, from 0, and a seed."""
Find = Callable[[int, int, Picture], Masks]


@dataclass(frozen=True)
class PictureScores:
    """What was measured of one picture.

    Attributes:
        prompt: number of its prompt, from 0.
        seed: seed of its noise.
        values: see :data:`Values`.
        crops: concept -> what was found of it, small.
    """

    prompt: int
    seed: int
    values: Values
    crops: Mapping[str, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        prompts: the prompts.
        seeds: seeds of each prompt's pictures.
        concepts: names of the concepts.
        pictures: one for each prompt and seed, prompt by prompt.
        diversity: of each prompt's pictures, by measure.
        references: concept -> crops of what it ought to look like, small.
        judge: the measure of identity that mixing is judged by, "" if there is none.
    """

    prompts: tuple[ConceptPrompt, ...]
    seeds: tuple[int, ...]
    concepts: tuple[str, ...]
    pictures: tuple[PictureScores, ...]
    diversity: tuple[Mapping[str, float], ...]
    references: Mapping[str, Pictures] = field(default_factory=dict)
    judge: str = ""


def evaluate(
    task: Task, draw: Draw, find: Find, watch: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Draw and measure one picture for each prompt and seed.

    Sources: agreement and identity as in Break-a-Scene (Avrahami et al. 2023) and VCD (Rahman et al. 2024,
    section 4); diversity as in VCD; mixing after MuDI (Jang et al. 2024).

    Args:
        task: what is evaluated.
        draw: draws a picture.
        find: finds the concepts of its prompt in a picture.
        watch: called with the number of pictures that are done and of all.
    """
    scores: list[PictureScores] = []
    diversity = []
    total = len(task.prompts) * len(task.seeds)
    for prompt in range(len(task.prompts)):
        pictures = []
        for seed in task.seeds:
            pictures.append(quantised(draw(prompt, seed)))
            masks = find(prompt, seed, pictures[-1])
            scores.append(scores_of(task, prompt, seed, pictures[-1], masks))
            watch(len(scores), total)
        diversity.append(diversity_of(task.instruments, pictures))
    return Evaluation(
        prompts=task.prompts,
        seeds=task.seeds,
        concepts=task.concepts.names,
        pictures=tuple(scores),
        diversity=tuple(diversity),
        references={n: tuple(map(thumbnail, task.references[n])) for n in task.compared},
        judge=(task.instruments.judge or "") if task.compared else "",
    )


def scores_of(task: Task, prompt: int, seed: int, picture: Picture, masks: Masks) -> PictureScores:
    """Measure one picture."""
    values: dict[tuple[str, str], float] = {}
    if task.instruments.clip is not None and task.texts is not None:
        (seen,) = task.instruments.clip.images([picture])
        values[AGREEMENT, ""] = float(seen @ task.texts[prompt])
    names = task.prompts[prompt].names
    crops = {n: masked_crop(picture, masks[n]) for n in names if n in masks and masks[n].any()}
    values |= {(FOUND, name): float(name in crops) for name in names}
    for look in task.looks:
        values |= identity(task, look, names, crops)
    return PictureScores(prompt, seed, values, {n: thumbnail(crop) for n, crop in crops.items()})


def identity(
    task: Task, look: str, names: Sequence[str], crops: Mapping[str, Float[Tensor, "3 _h _w"]]
) -> dict[tuple[str, str], float]:
    """Compare the crops with all references; by the judge also say what looks like another concept."""
    wanted = [name for name in names if name in task.compared]
    found = [name for name in wanted if name in crops]
    if not wanted:
        return {}
    vectors: dict[str, Tensor] = {}
    if found:
        encoded = task.instruments.looks[look].images([crops[name] for name in found])
        vectors = dict(zip(found, encoded, strict=True))
    references = [task.looks[look][name] for name in task.compared]
    table = similarities([vectors.get(name) for name in wanted], references)
    own = [task.compared.index(name) for name in wanted]
    values = {
        (look, name): float(table[row, own[row]])
        for row, name in enumerate(wanted)
        if name in vectors
    }
    if look != task.instruments.judge:
        return values
    if len(references) > 1:
        values |= {
            (MIXED, name): float(int(table[row].argmax()) != own[row])
            for row, name in enumerate(wanted)
            if name in vectors
        }
    if len(wanted) > 1:
        truth = among_references([references[index] for index in own])
        values[COMPARED, ""] = detect_and_compare(table[:, own], truth)
    return values


def diversity_of(instruments: Instruments, pictures: Pictures) -> dict[str, float]:
    """Return how much a prompt's pictures differ: by LPIPS, else by DINO; nothing for one picture."""
    lpips = instruments.lpips
    if lpips is not None:
        found = pairwise(
            len(pictures), lambda i, j: float(lpips(pictures[i][None], pictures[j][None]))
        )
        return {} if found is None else {LPIPS: found}
    if DINO in instruments.looks:
        vectors = instruments.looks[DINO].images(pictures)
        found = pairwise(len(pictures), lambda i, j: 1 - float(vectors[i] @ vectors[j]))
        return {} if found is None else {DINO_DIVERSITY: found}
    return {}


def quantised(picture: Picture) -> Picture:
    """Return a picture as it is after it was saved, so that what is read back measures the same."""
    return from_image(to_image(picture))


def thumbnail(crop: Picture) -> Float[Tensor, "3 _h _w"]:
    return resize(crop.cpu(), (THUMBNAIL, THUMBNAIL), "picture")
