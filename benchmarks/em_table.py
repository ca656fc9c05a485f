"""Table and curves of the runs that em.py made: results/em.md and results/em.png.

    python benchmarks/em_table.py

A scene's value is its mean over the seeds; means, spreads and paired differences are over scenes. An arm
that was run on fewer scenes or seeds has its mean over those, and its difference over the common runs.
Intervals are 95% by Student's t on the scenes' paired differences.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

RESULTS = Path(__file__).parent / "results"
ARMS = {
    "fixed_literal": "the paper's initial masks, kept (all timesteps and layers, threshold 0.4)",
    "initial": "our initial masks = `fixed`",
    "words": "words only, nothing learned, as many passes as EM",
    "read_once": "tokens learned under the fixed masks, read off once, as many passes as EM",
    "em": "**EM (default)**",
    "em_literal": "EM, the paper's literal loop",
    "em_one_start": "EM from the first random draw (VCD) instead of the best of 16",
    "em_lenient": "EM that takes masks of 0.9 of the present contrast",
    "em_no_crf": "EM without CRF",
    "em_no_attention_loss": "EM without the attention loss",
    "em_no_masked_loss": "EM without the masked loss",
}
# Lines of the figure: masks that are never estimated again.
KEPT = (
    ("initial", "goldenrod", "-", "our first masks, kept"),
    ("fixed_literal", "firebrick", "--", "the paper's first masks, kept"),
)
# What was aimed at: the default's final IoU, and its gain over an arm; at the least.
FINAL = {"A": 0.92, "B": 0.85, "C": 0.80}
GAINS = {"initial": {"A": 0.0, "B": 0.05, "C": 0.15}, "read_once": {"A": 0.0, "B": 0.05, "C": 0.05}}
FALL, LOSS = 0.01, 0.05
Scenes = dict[int, float]
Runs = dict[tuple[int, int], float]


def by_run(rows: list[dict[str, Any]], arm: str) -> Runs:
    """(scene, seed) -> value; the initial masks, which `fixed` keeps, are the start of the EM runs."""
    name, field = ("em", "start") if arm == "initial" else (arm, "final")
    return {(row["scene"], row["seed"]): row[field] for row in rows if row["arm"] == name}


def by_scene(runs: Runs) -> Scenes:
    """Scene -> mean over its seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for (scene, _), value in runs.items():
        values[scene].append(value)
    return {scene: float(np.mean(found)) for scene, found in values.items()}


def curves_by_scene(rows: list[dict[str, Any]]) -> np.ndarray:
    """IoU of the default EM at the start and every E-step, one row a scene: its mean over the seeds."""
    curves: dict[int, list[list[float]]] = defaultdict(list)
    for row in rows:
        if row["arm"] == "em":
            curves[row["scene"]].append(row["curve"])
    return np.array([np.mean(rows, axis=0) for rows in curves.values()])


def paired(a: Runs, b: Runs) -> tuple[float, float]:
    """Mean difference a - b over the scenes of common runs, and half the width of its 95% interval."""
    common = {run: a[run] - b[run] for run in a.keys() & b.keys()}
    differences = np.array(list(by_scene(common).values()))
    if len(differences) < 2:
        return float("nan"), float("nan")
    half = (
        stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    )
    return float(differences.mean()), float(half)


def table(rows: list[dict[str, Any]], set_: str) -> list[str]:
    """Lines of one set."""
    rows = [row for row in rows if row["set"] == set_]
    em = by_run(rows, "em")
    lines = [
        f"### Set {set_}",
        "",
        "| arm | scenes | runs | mean IoU | spread (sd over scenes) | default EM over it, 95% interval |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm, title in ARMS.items():
        found = by_run(rows, arm)
        if not found:
            continue
        values = np.array(list(by_scene(found).values()))
        difference, half = paired(em, found)
        versus = "" if arm == "em" else f"{difference:+.3f} +- {half:.3f}"
        mean, spread = values.mean(), values.std(ddof=1)
        counts = f"{len(values)} | {len(found)}"
        lines.append(f"| {title} | {counts} | {mean:.3f} | {spread:.3f} | {versus} |")
    return [*lines, "", *curve_lines(rows), ""]


def largest_fall(rows: list[dict[str, Any]]) -> float:
    """How far the default's mean curve ever lies below an earlier round."""
    curve = curves_by_scene(rows).mean(axis=0)
    return max(0.0, float(np.max(np.maximum.accumulate(curve) - curve)))


def lost_scenes(rows: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """(difference, scene) of those that end more than LOSS below their start."""
    start, final = by_scene(by_run(rows, "initial")), by_scene(by_run(rows, "em"))
    return [(d, s) for d, s in sorted((final[s] - start[s], s) for s in final) if d < -LOSS]


def curve_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What the curves must not do: fall."""
    curve = curves_by_scene(rows).mean(axis=0)
    bad = [f"{s} ({d:+.3f})" for d, s in lost_scenes(rows)]
    return [
        "Mean curve of the default EM, start and every E-step: "
        + " ".join(f"{v:.3f}" for v in curve)
        + ".",
        f"Largest fall of the mean curve from an earlier round: {largest_fall(rows):.4f}. "
        f"Scenes that end more than {LOSS} below their start: {', '.join(bad) or 'none'}.",
    ]


def overview(rows: list[dict[str, Any]], sets: list[str]) -> list[str]:
    """Mean IoU of every arm in every set."""
    lines = [f"| arm | {' | '.join(sets)} |", "| --- |" + " --- |" * len(sets)]
    for arm, title in ARMS.items():
        cells = []
        for set_ in sets:
            found = by_scene(by_run([row for row in rows if row["set"] == set_], arm))
            cells.append(f"{np.mean(list(found.values())):.3f}" if found else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def aims(rows: list[dict[str, Any]]) -> list[str]:
    """What was aimed at and what came of it; a gain counts where its interval excludes 0."""
    lines = [
        "| aim for the default EM | set | aimed at | found | reached |",
        "| --- |" + " --- |" * 4,
    ]

    def add(what: str, set_: str, aim: str, found: str, reached: bool) -> None:
        lines.append(f"| {what} | {set_} | {aim} | {found} | {'yes' if reached else 'no'} |")

    for set_ in FINAL:
        of_set = [row for row in rows if row["set"] == set_]
        em = by_run(of_set, "em")
        mean = float(np.mean(list(by_scene(em).values())))
        add("mean IoU", set_, f">= {FINAL[set_]:.2f}", f"{mean:.3f}", mean >= FINAL[set_])
        for arm, title in (("initial", "over `fixed`"), ("read_once", "over read once")):
            aim = GAINS[arm][set_]
            gain, half = paired(em, by_run(of_set, arm))
            reached = gain >= aim and gain - half > 0 if aim else gain + half >= 0
            wanted = f">= +{aim:.2f}, interval above 0" if aim else "interval not below 0"
            add(title, set_, wanted, f"{gain:+.3f} +- {half:.3f}", reached)
        fall, lost = largest_fall(of_set), lost_scenes(of_set)
        add("fall of the mean curve", set_, f"<= {FALL}", f"{fall:.4f}", fall <= FALL)
        add(f"scenes that lose over {LOSS}", set_, "none", str(len(lost) or "none"), not lost)
    return [*lines, ""]


def draw(rows: list[dict[str, Any]], sets: list[str], path: Path) -> None:
    """IoU against rounds (the paper's Fig. 3 in small): EM, its spread over runs, and the fixed masks."""
    figure = Figure(figsize=(4.6 * len(sets), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, set_ in zip(
        np.atleast_1d(figure.subplots(1, len(sets), sharey=True)), sets, strict=True
    ):
        of_set = [row for row in rows if row["set"] == set_]
        curves = curves_by_scene(of_set)
        rounds = np.arange(curves.shape[1])
        low, middle, high = np.quantile(curves, [0.1, 0.5, 0.9], axis=0)
        axis.fill_between(rounds, low, high, alpha=0.2, label="EM, 10% to 90% of scenes")
        axis.plot(rounds, curves.mean(axis=0), label="EM, mean")
        axis.plot(rounds, middle, linestyle=":", label="EM, median")
        for arm, colour, line, label in KEPT:
            values = list(by_run(of_set, arm).values())
            if values:
                axis.axhline(np.mean(values), color=colour, linestyle=line, label=label)
        axis.set(title=f"set {set_}", xlabel="E-step", ylim=(0.4, 1))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mask IoU")
    figure.axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS / "em_runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.runs.read_text().splitlines()]
    sets = sorted({row["set"] for row in rows})
    lines = [
        "# Does EM pay?",
        "",
        "Mask IoU, mean over the two concepts of a scene; see benchmarks/em.py.",
        "",
        *overview(rows, sets),
        "## What was aimed at",
        "",
        *aims(rows),
        "## Set by set",
        "",
    ]
    for set_ in sets:
        lines += table(rows, set_)
    (args.out / "em.md").write_text("\n".join(lines))
    draw(rows, sets, args.out / "em.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
