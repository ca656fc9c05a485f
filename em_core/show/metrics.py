"""What a run reports in metrics.json."""

from typing import Any

from ..method.loop import not_found, not_seen
from ..method.problem import Problem
from ..method.state import Curves, RunState


def curves_of(curves: Curves, kind: str) -> dict[str, tuple[tuple[int, float], ...]]:
    """Return the curves that are named `<kind>/<name>`, by name."""
    prefix = kind + "/"
    return {
        name.removeprefix(prefix): points
        for name, points in curves.items()
        if name.startswith(prefix)
    }


def final_iou(curves: Curves) -> float | None:
    """Return the mean of the concepts' last IoU, or None without true masks."""
    last = [points[-1][1] for points in curves_of(curves, "iou").values()]
    return sum(last) / len(last) if last else None


def metrics(problem: Problem, state: RunState, seconds: float) -> dict[str, Any]:
    """Return the content of metrics.json; `iou` and `final_iou` are None without true masks.

    `missing` names the concepts that have no mask, with the numbers of those pictures, and `doubtful` those
    that the model saw nowhere in pictures where they have one.
    """
    curves = state.curves
    found = curves_of(curves, "loss")
    for kind in ("joint", "visual"):
        named = curves_of(curves, f"{kind}_loss")
        found |= {f"{kind}_{name}": points for name, points in named.items()}
    return {
        "mode": problem.settings.mode,
        "seed": problem.settings.seed,
        "steps": problem.settings.steps,
        "seconds": round(seconds, 3),
        "iou": curves_of(curves, "iou") or None,
        "final_iou": final_iou(curves),
        "area": curves_of(curves, "area"),
        "missing": not_found(problem, state),
        "doubtful": not_seen(problem, state),
        "losses": found,
    }
