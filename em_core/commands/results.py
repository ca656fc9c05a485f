"""What `python -m em_core learn` leaves in its folder."""

import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..files import write_json
from ..jobs.outputs import save_masks
from ..method.problem import Problem
from ..method.state import RunState
from ..runs.concept_set import ConceptSet, conclude
from ..runs.learning import with_weights_of
from ..runs.visual_condition import VisualCondition, conclude_condition
from ..show.metrics import metrics
from ..show.plots import plot_curves
from .visual import CONDITION

CONCEPTS = "concepts.safetensors"


def write_results(
    problem: Problem,
    state: RunState,
    out: Path,
    seconds: float,
    known: ConceptSet | None = None,
) -> None:
    """Write concepts.safetensors, condition.safetensors of a visual condition, mask_<concept>.png,
    curves.png and metrics.json.

    Raises:
        UserError: a file cannot be written; the message says where the concepts are.
    """
    if problem.visual is not None:
        condition = conclude_condition(problem, state, known)
        save_somewhere(condition, out / CONDITION)
        save_somewhere(condition.concepts, out / CONCEPTS)
    else:
        save_somewhere(with_weights_of(known, conclude(problem, state)), out / CONCEPTS)
    if problem.settings.mode != "none":
        write_masks(problem, state, out)
    plot_curves(state.curves, out / "curves.png")
    write_json(out / "metrics.json", metrics(problem, state, seconds))


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


def write_masks(problem: Problem, state: RunState, out: Path) -> None:
    """Write the masks at their pictures' own size; with several pictures, a number follows the name."""
    several = len(problem.pictures) > 1
    for number, (prepared, picture) in enumerate(
        zip(problem.pictures, state.pictures, strict=True), start=1
    ):
        size = prepared.example.picture.shape[-2:]
        masks = dict(zip(prepared.names, picture.labels, strict=True))
        save_masks(out, masks, (size[0], size[1]), number if several else None)
