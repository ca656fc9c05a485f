"""Plots of a run's curves; they need matplotlib, which is an optional extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_aside
from ..method.state import Curves

PANELS = (
    ("iou", "mask IoU"),
    ("area", "mask area (share of the picture)"),
    ("loss", "loss"),
    ("joint_loss", "joint loss"),
)
SMOOTHING = 15


def load_matplotlib() -> tuple[Any, Any]:
    """Return matplotlib's Figure and its canvas for drawing without a window.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib. Install it: pip install matplotlib") from error
    return Figure, FigureCanvasAgg


def plot_curves(curves: Curves, path: Path) -> None:
    """Write a PNG with one panel each for IoU, areas and losses, leaving out those without curves.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    Figure, FigureCanvasAgg = load_matplotlib()
    panels = [
        (kind, title)
        for kind, title in PANELS
        if any(name.startswith(kind + "/") for name in curves)
    ]
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (kind, title) in zip(
        np.atleast_1d(figure.subplots(1, max(1, len(panels)))), panels, strict=False
    ):
        draw_panel(axis, curves, kind, title)
    write_aside(path, lambda aside: figure.savefig(aside, dpi=110))


def draw_panel(axis: Any, curves: Curves, kind: str, title: str) -> None:
    """Draw one panel with every curve of a kind; losses are smoothed over their noisy points."""
    for name in sorted(name for name in curves if name.startswith(kind + "/")):
        steps, values = zip(*curves[name], strict=True)
        label = name.partition("/")[2]
        if kind.endswith("loss"):
            (line,) = axis.plot(steps, values, alpha=0.25, linewidth=0.8)
            axis.plot(steps, running_mean(values), color=line.get_color(), label=label)
        else:
            axis.plot(steps, values, marker="o", markersize=3, label=label)
    axis.set(title=title, xlabel="step")
    if kind in ("iou", "area"):
        axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def running_mean(values: Sequence[float], width: int = SMOOTHING) -> list[float]:
    """Average each value with up to `width` - 1 values before it."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    return [
        (total[end] - total[max(0, end - width)]) / min(width, end)
        for end in range(1, len(values) + 1)
    ]
