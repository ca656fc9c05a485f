"""From single pictures to a few numbers with intervals, and to an order of the pictures."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from .encoders import CLIP_IMAGE, DINO
from .evaluation import (
    AGREEMENT,
    COMPARED,
    DINO_DIVERSITY,
    FOUND,
    LPIPS,
    MIXED,
    Evaluation,
    PictureScores,
)
from .measures import interval

ALL = "all"
Order = list[tuple[PictureScores, float]]
"""Pictures from best to worst, with the value that they are ordered by."""


@dataclass(frozen=True)
class Measure:
    """What a measure is called, which values of it are better, what it says, and its range."""

    title: str
    better: str
    meaning: str
    least: float = -1.0
    most: float = 1.0


MEASURES = {
    AGREEMENT: Measure(
        "prompt agreement", "higher",
        "cosine of CLIP's vectors of the picture and of the prompt, in which the concepts' words stand for "
        "the concepts",
    ),
    FOUND: Measure(
        "found", "higher", "share of the pictures in which the concept's mask was found by its tokens", least=0.0
    ),
    CLIP_IMAGE: Measure(
        "identity, CLIP", "higher",
        "cosine of CLIP's vectors of the concept's crop and of its references, where it was found",
    ),
    DINO: Measure(
        "identity, DINO", "higher",
        "cosine of DINO's vectors of the concept's crop and of its references, where it was found",
    ),
    MIXED: Measure(
        "mixed", "lower", "share of the found crops that look more like another concept than like their own",
        least=0.0,
    ),
    COMPARED: Measure(
        "detect and compare", "higher",
        "1 minus the squared difference of two tables of similarities: of the crops with the references, and of "
        "the references among themselves (pictures of several concepts; what was not found counts as 0)",
        least=-inf,
    ),
    LPIPS: Measure(
        "diversity, LPIPS", "higher", "LPIPS between the pictures of one prompt, mean of all pairs",
        least=0.0, most=inf,
    ),
    DINO_DIVERSITY: Measure(
        "diversity, 1 - DINO", "higher",
        "1 minus the cosine of DINO's vectors of the pictures of one prompt, mean of all pairs",
        least=0.0, most=2.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measure: key in :data:`MEASURES`.
        concept: a name, "all" for the mean of several, "" for what is measured of whole pictures.
        mean: mean over the prompts, each of which counts the same.
        ends: ends of the mean's 95% interval over the prompts, within the measure's range; None for a
            single prompt.
        values: how many single values there are.
    """

    measure: str
    concept: str
    mean: float
    ends: tuple[float, float] | None
    values: int


def summarise(evaluations: Sequence[Evaluation]) -> tuple[Row, ...]:
    """Return the table of one evaluation or, of several together, without single concepts.

    The interval is Student's over the prompts' means, since pictures of one prompt are alike.
    """
    rows = []
    names = evaluations[0].concepts if len(evaluations) == 1 else ()
    groups = [group for evaluation in evaluations for group in by_prompt(evaluation)]
    for measure in MEASURES:
        found = {concept for group in groups for key, concept in group if key == measure}
        whole = "" if found == {""} else ALL
        single = [name for name in names if name in found]
        if not found:
            continue
        if len(single) == 1:
            whole = single[0]
        elif single:
            rows += [row_of(measure, name, groups, {name}) for name in single]
        rows.append(row_of(measure, whole, groups, found))
    return tuple(rows)


Group = dict[tuple[str, str], list[float]]
"""All values of a prompt, by measure and concept."""


def by_prompt(evaluation: Evaluation) -> list[Group]:
    """Return the values of each prompt's pictures, together with their diversity."""
    groups: list[Group] = [defaultdict(list) for _ in evaluation.prompts]
    for scores in evaluation.pictures:
        for key, value in scores.values.items():
            groups[scores.prompt][key].append(value)
    for group, diversity in zip(groups, evaluation.diversity, strict=True):
        for measure, value in diversity.items():
            group[measure, ""].append(value)
    return groups


def row_of(measure: str, concept: str, groups: Sequence[Group], of: set[str]) -> Row:
    """Return a line on the named concepts together."""
    values = [
        [v for name in sorted(of) for v in group.get((measure, name), ())] for group in groups
    ]
    means = [sum(some) / len(some) for some in values if some]
    mean, half = interval(means)
    least, most = MEASURES[measure].least, MEASURES[measure].most
    ends = None if half is None else (max(least, mean - half), min(most, mean + half))
    return Row(measure, concept, mean, ends, sum(map(len, values)))


def rankings(evaluation: Evaluation) -> dict[str, Order]:
    """Return orders of the pictures from best to worst, by what they are ordered by.

    By identity, what was not found counts as 0.
    """
    found: dict[str, Order] = {}
    judge, known = evaluation.judge, set(evaluation.references)
    if judge:
        of = [(s, likeness(s, judge, known)) for s in evaluation.pictures if known & wanted(s)]
        found[MEASURES[judge].title] = in_order(of)
    agreeing = [s for s in evaluation.pictures if (AGREEMENT, "") in s.values]
    if agreeing:
        found[MEASURES[AGREEMENT].title] = in_order((s, s.values[AGREEMENT, ""]) for s in agreeing)
    return found


def in_order(scores: Iterable[tuple[PictureScores, float]]) -> Order:
    return sorted(scores, key=lambda pair: -pair[1])


def wanted(scores: PictureScores) -> set[str]:
    """Return the concepts that a picture ought to show."""
    return {name for measure, name in scores.values if measure == FOUND}


def likeness(scores: PictureScores, judge: str, known: set[str]) -> float:
    """Return the mean identity of the concepts that a picture ought to show and that have references."""
    names = sorted(known & wanted(scores))
    return sum(scores.values.get((judge, name), 0.0) for name in names) / len(names)
