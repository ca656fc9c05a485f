"""What `python -m em_core learn` leaves in its folder."""

import json
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..files import write_json
from ..jobs.inputs import CONCEPTS, CONDITION
from ..jobs.outputs import mask_file, save_masks
from ..method.problem import Problem
from ..method.state import RunState
from ..runs.concept_set import ConceptSet, conclude
from ..runs.learning import with_weights_of
from ..runs.visual_condition import VisualCondition, conclude_condition
from ..show.metrics import metrics
from ..show.plots import plot_curves
from ..show.words import say_iou, say_losses, say_masks

CURVES, METRICS = "curves.png", "metrics.json"
MADE_FROM = "made_from"


def write_results(
    problem: Problem,
    state: RunState,
    out: Path,
    seconds: float,
    made_from: Mapping[str, str],
    known: ConceptSet | None = None,
) -> list[str]:
    """Write concepts.safetensors, condition.safetensors of a visual condition, mask_<concept>.png,
    curves.png and metrics.json, and return the names of what was written.

    Args:
        problem, state: of the run.
        out: the folder.
        seconds: how long it took.
        made_from: digests of what the run was made from, for metrics.json.
        known: concepts that it started from.

    Raises:
        UserError: a file cannot be written; the message says where the concepts are.
    """
    names = [CONCEPTS]
    if problem.visual is not None:
        condition = conclude_condition(problem, state, known)
        save_somewhere(condition, out / CONDITION)
        save_somewhere(condition.concepts, out / CONCEPTS)
        names.append(CONDITION)
    else:
        save_somewhere(with_weights_of(known, conclude(problem, state)), out / CONCEPTS)
    if problem.settings.mode != "none":
        names += write_masks(problem, state, out)
    plot_curves(state.curves, out / CURVES)
    told = metrics(problem, state, seconds) | {MADE_FROM: dict(made_from)}
    write_json(out / METRICS, told)
    return [*names, CURVES, METRICS]


def read_made_from(file: Path) -> Mapping[str, str]:
    """Return the digests of what a finished run was made from, as its metrics.json tells them.

    Raises:
        UserError: it tells none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[MADE_FROM]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} does not tell what the finished run there was made from, so whether it is this one is not "
            "known. Choose another folder with --out, or replace the run with --overwrite."
        ) from error


def summary(problem: Problem, state: RunState) -> list[str]:
    """Return what was found, in lines."""
    masks = [
        dict(zip(prepared.names, picture.labels, strict=True))
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    ]
    names = ", ".join(concept.name for concept in problem.concepts)
    found = (
        f"Learned: {names}." if problem.settings.mode == "none" else f"Masks: {say_masks(masks)}."
    )
    return [found, say_iou(state.curves), say_losses(state.curves)]


def save_somewhere(concepts: ConceptSet | VisualCondition, file: Path) -> None:
    """Save learned concepts, where possible in the file asked for.

    Raises:
        UserError: they could not be saved there; the message says where they are instead.
    """
    try:
        concepts.save(file)
    except UserError as error:
        other = saved_aside(concepts, f"{file.stem}-{secrets.token_hex(4)}{file.suffix}")
        where = f" Nothing is lost: the concepts are in {other}." if other else ""
        raise UserError(f"{error}{where}") from error


def saved_aside(concepts: ConceptSet | VisualCondition, name: str) -> Path | None:
    """Save the concepts in the system's folder for temporary files or the user's own, if one takes them."""
    for folder in (Path(tempfile.gettempdir()), Path.home()):
        with suppress(UserError):
            concepts.save(folder / name)
            return folder / name
    return None


def write_masks(problem: Problem, state: RunState, out: Path) -> list[str]:
    """Write the masks at their pictures' own size, and return their names; with several pictures, a number
    follows the concept's."""
    several, names = len(problem.pictures) > 1, []
    for number, (prepared, picture) in enumerate(
        zip(problem.pictures, state.pictures, strict=True), start=1
    ):
        size, of_picture = prepared.example.picture.shape[-2:], number if several else None
        masks = dict(zip(prepared.names, picture.labels, strict=True))
        save_masks(out, masks, (size[0], size[1]), of_picture)
        names += [mask_file(name, of_picture) for name in masks]
    return names
