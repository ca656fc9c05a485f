"""Table and figures of the runs that em.py made: results/em.md, em.png and em_gain.png.

    python benchmarks/em_table.py

A scene's value is its mean over concepts and seeds; means and paired differences are over scenes,
with 95% intervals by Student's t. A difference is over the runs that both arms have. Every figure says
how many scenes it is from, so the table can be made before all runs are there.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from em import RESULTS, Row, read_rows
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

ARMS = {
    "first_literal": "the paper's first masks",
    "fixed": "our first masks, kept",
    "first_no_regions": "first masks without regions",
    "first_no_rivals": "first masks without rivals",
    "first_no_regions_no_rivals": "first masks without either",
    "read_once": "tokens learned under `fixed` masks, then read once",
    "em": "**EM, the default**",
    "em_no_crf": "EM without CRF",
    "em_no_attention_loss": "EM without the attention loss (Eq. 4)",
    "em_literal": "EM, the paper's literal loop",
}
TITLES = {arm: f"`{arm}`: {what}" for arm, what in ARMS.items()}
# Lines of the figure: masks that are not estimated in rounds.
KEPT = {"fixed": "goldenrod", "read_once": "seagreen", "first_literal": "firebrick"}
LEARNED = (*"ABCDEFGHI", "one")
BY_PLACE = "CDE"
"""Cases whose words tell nothing apart: the given order is a rule, from left to right."""
MEANS = {"A": 0.94, "B": 0.92, "C": 0.88, "D": 0.88, "E": 0.85, "F": 0.93, "G": 0.85, "H": 0.93}
MEANS |= {"I": 0.88, "one": 0.88}
LOST = {"A, B, H": 1} | {case: 2 for case in (*"CDEFGI", "one")}
LOW, GAIN, FALL, IS_LOST, REPORTED, FALSE = 0.80, 0.05, 0.005, 0.3, 0.90, 0.02
COUNTED, SEEN = 0.80, 0.85
Run = tuple[str, int, int]
Runs = dict[Run, float]
Interval = tuple[float, float, int]
Line = tuple[str, ...]


def finals(rows: Iterable[Row], arm: str, kind: str = "given") -> dict[Run, list[float]]:
    """(case, scene, seed) -> IoU of the concepts in the end; `fixed` is what `em` starts from."""
    name, at = ("em", 0) if arm == "fixed" else (arm, -1)
    return {
        (row["case"], row["scene"], row["seed"]): row[kind][at]
        for row in rows
        if row["arm"] == name and kind in row
    }


def values(rows: Iterable[Row], arm: str, cases: Sequence[str], kind: str = "given") -> Runs:
    """The same as means over the concepts."""
    found = finals(rows, arm, kind)
    return {run: float(np.mean(each)) for run, each in found.items() if run[0] in cases}


def less(a: Runs, b: Runs) -> Runs:
    """a - b of the runs that both have."""
    return {run: a[run] - b[run] for run in a if run in b}


def interval(runs: Runs) -> Interval:
    """Mean over scenes, half the width of its 95% interval, and the number of scenes."""
    scenes: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (case, scene, _), value in runs.items():
        scenes[case, scene].append(value)
    means = np.array([np.mean(each) for each in scenes.values()])
    if len(means) < 2:
        return float(means.mean()) if len(means) else np.nan, np.nan, len(means)
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return float(means.mean()), float(half), len(means)


def shown(found: Interval, sign: str = "") -> str:
    """An interval with its number of scenes in brackets."""
    mean, half, scenes = found
    if not scenes:
        return ""
    width = f" +- {half:.3f}" if scenes > 1 else ""
    return f"{mean:{sign}.3f}{width} ({scenes})"


def markdown(head: Line, lines: Iterable[Line]) -> list[str]:
    """Lines of a table."""
    every = (head, ("---",) * len(head), *lines)
    return [*("| " + " | ".join(line) + " |" for line in every), ""]


def overview(rows: list[Row], cases: Sequence[str], kind: str = "given") -> list[str]:
    """Mean IoU of every arm in every case."""
    lines = [
        (title, *(shown(interval(values(rows, arm, [case], kind))) for case in cases))
        for arm, title in TITLES.items()
    ]
    return markdown(("arm", *cases), (line for line in lines if any(line[1:])))


def lost(rows: list[Row], arm: str, cases: Sequence[str]) -> tuple[int, int, int]:
    """Concepts lost, and the numbers of concepts and runs that they are of."""
    found = [each for run, each in finals(rows, arm).items() if run[0] in cases]
    ious = [iou for each in found for iou in each]
    return sum(iou < IS_LOST for iou in ious), len(ious), len(found)


def lost_table(rows: list[Row]) -> list[str]:
    """Concepts lost by arm and case, of how many; and runs that found nothing at all."""
    lines = []
    for arm, title in TITLES.items():
        counts = [lost(rows, arm, [case]) for case in LEARNED]
        if any(of for _, of, _ in counts):
            cells = (f"{few} / {of}" if of else "" for few, of, _ in counts)
            empty = sum(not any(each) for each in finals(rows, arm).values())
            lines.append((title, *cells, str(empty)))
    given, best = finals(rows, "em"), finals(rows, "em", "best")
    by_best = [
        two >= IS_LOST
        for run, concepts in given.items()
        for one, two in zip(concepts, best[run], strict=True)
        if one < IS_LOST
    ]
    said = (
        f"Of the {len(by_best)} that `em` loses {sum(by_best)} have a mask by the better assignment: it bears "
        "another of the prompt's names. em_lost.png shows the scenes."
    )
    return [*markdown(("arm", *LEARNED, "runs of IoU 0"), lines), said, ""]


def low_starts(rows: list[Row], other: bool) -> Runs:
    """Gain of EM over `fixed` in runs that start low, or in those whose other seed starts low."""
    start, end = (values(rows, arm, LEARNED) for arm in ("fixed", "em"))
    gains = less(end, start)

    def judge(run: Run) -> float:
        case, scene, seed = run
        return start.get((case, scene, 1 - seed), 1.0) if other else start[run]

    return {run: gain for run, gain in gains.items() if judge(run) < LOW}


def gain(rows: list[Row], arm: str, cases: Sequence[str]) -> Interval:
    """Gain of the default EM over an arm."""
    return interval(less(values(rows, "em", cases), values(rows, arm, cases)))


def gains(rows: list[Row]) -> list[str]:
    """Gain of the default EM over every other arm, by case and in all."""
    groups = {case: [case] for case in LEARNED} | {"C to I": list("CDEFGHI"), "all": LEARNED}
    arms = [arm for arm in ARMS if arm != "em" and values(rows, arm, LEARNED)]
    head = ("`em` over", *(f"`{arm}`" for arm in arms))
    lines = [
        (name, *(shown(gain(rows, arm, cases), "+") for arm in arms))
        for name, cases in groups.items()
    ]
    low, other = (shown(interval(low_starts(rows, which)), "+") for which in (False, True))
    return [
        *markdown(head, lines),
        f"Over `fixed`, runs that start below {LOW:.2f}: {low or 'none'}. Low starts are in part "
        f"bad luck; of runs whose other seed starts below {LOW:.2f}: {other or 'none'}.",
        "",
    ]


def share(flags: Sequence[bool]) -> str:
    """How many are true, as a share and as a count."""
    return f"{np.mean(flags):.1%} ({sum(flags)} / {len(flags)})" if flags else ""


def told_of(row: Row) -> list[str]:
    """The names that a run says are missing, or doubtful."""
    return [*row["missing"], *row["doubtful"]]


def reported(rows: list[Row], arm: str, what: Callable[[Row], list[str]]) -> list[bool]:
    """Of runs that name something absent, whether they said so."""
    return ["absent" in what(row) for row in rows if row["arm"] == arm]


def accused(rows: list[Row], arm: str, what: Callable[[Row], list[str]]) -> list[bool]:
    """Of concepts that the pictures of A to F show, whether a run said so of them."""
    found = [row for row in rows if row["arm"] == arm and row["case"] in (*"ABCDEF", "absent")]
    return [name in what(row) for row in found for name in row["names"] if name != "absent"]


def absence(rows: list[Row]) -> list[str]:
    """What is said to be missing or doubtful, rightly and wrongly."""
    kinds: tuple[Callable[[Row], list[str]], ...] = (
        lambda row: list(row["missing"]),
        lambda row: list(row["doubtful"]),
        told_of,
    )
    asked = (
        ("an absent thing, named alone", reported, "alone"),
        ("an absent thing, named after all that is there", reported, "added"),
        ("the things that are there, beside it", accused, "added"),
        ("the things of A to F, under their own prompts", accused, "present"),
    )
    lines = [(text, *(share(of(rows, arm, kind)) for kind in kinds)) for text, of, arm in asked]
    ends = share(accused(rows, "em", lambda row: list(row["missing"][-1])))
    lines.append(("the same, at the end of EM", ends, "", ""))
    return markdown(("what", "missing", "doubtful", "either"), lines)


def aims(rows: list[Row]) -> list[str]:
    """What was aimed at beside what was found; an aim without runs is not answered."""
    lines: list[Line] = []

    def add(what: str, where: str, aim: str, found: str, reached: bool) -> None:
        answer = ("yes" if reached else "no") if found else "not run"
        lines.append((what, where, aim, found, answer))

    for case, aim in MEANS.items():
        found = interval(values(rows, "em", [case]))
        add("mean IoU of EM", case, f">= {aim:.2f}", shown(found), found[0] >= aim)
    for cases, most in LOST.items():
        few, of, runs = lost(rows, "em", cases.split(", "))
        count = f"{few} of {of} in {runs} runs" if of else ""
        add("concepts that EM loses", cases, f"at most {most}", count, few <= most)
    for case in LEARNED:
        found = gain(rows, "fixed", [case])
        add("EM over `fixed`", case, f">= -{FALL}", shown(found, "+"), found[0] >= -FALL)
    found = interval(low_starts(rows, other=False))
    well = found[0] >= GAIN and found[0] - found[1] > 0
    aim_text = f">= +{GAIN}, interval above 0"
    add("EM over `fixed`", f"starts below {LOW:.2f}", aim_text, shown(found, "+"), well)
    found = gain(rows, "read_once", "CDEFGHI")
    add("EM over read once", "C to I", "> 0", shown(found, "+"), found[0] > 0)
    for way in ("alone", "added"):
        told = reported(rows, way, told_of)
        well = bool(told) and bool(np.mean(told) >= REPORTED)
        add("absent thing missing or doubtful", way, f">= {REPORTED:.0%}", share(told), well)
    alarms = accused(rows, "present", lambda row: list(row["missing"]))
    well = bool(alarms) and bool(np.mean(alarms) <= FALSE)
    add("missing, falsely", "A to F", f"<= {FALSE:.0%}", share(alarms), well)
    discovered(rows, add)
    return markdown(("aim", "case", "aimed at", "found", "reached"), lines)


def discovered(rows: list[Row], add: Callable[[str, str, str, str, bool], None]) -> None:
    """The aims of finding things without a word: by set, and all together."""
    rows = [row for row in rows if row["case"] == "discover"]
    for set_ in (*sorted({row["set"] for row in rows}), ""):
        found = [row for row in rows if set_ in ("", row["set"])]
        right = [row["count"] == row["things"] for row in found]
        where = f"set {set_}" if set_ else "all sets"
        well = bool(right) and bool(np.mean(right) >= COUNTED)
        add("discover: number right", where, f">= {COUNTED:.0%}", share(right), well)
        each = {(set_, row["scene"], row["seed"]): float(np.mean(row["best"][-1])) for row in found}
        mean = interval(each)
        add("discover: mean IoU", where, f">= {SEEN:.2f}", shown(mean), mean[0] >= SEEN)


def curves(rows: list[Row], case: str) -> NDArray[np.float64]:
    """Mean IoU of the default EM at the start and after every round, a row a scene."""
    scenes: dict[int, list[list[float]]] = defaultdict(list)
    for row in rows:
        if row["arm"] == "em" and row["case"] == case:
            scenes[row["scene"]].append([float(np.mean(each)) for each in row["given"]])
    length = max(len(curve) for every in scenes.values() for curve in every)
    # A run that found nothing has no rounds.
    padded = [
        [curve + curve[-1:] * (length - len(curve)) for curve in every] for every in scenes.values()
    ]
    return np.array([np.mean(every, axis=0) for every in padded])


def curve_lines(rows: list[Row], cases: Sequence[str]) -> list[str]:
    """The mean curve of every case."""
    lines = []
    for case in cases:
        found = curves(rows, case)
        lines.append((case, str(len(found)), " ".join(f"{v:.3f}" for v in found.mean(axis=0))))
    return markdown(("case", "scenes", "mean IoU of EM at the start and after every round"), lines)


def draw_curves(rows: list[Row], cases: Sequence[str], path: Path) -> None:
    """IoU against rounds (the paper's Fig. 3 in small), with the arms that EM is compared with."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, -(-len(LEARNED) // 2), sharex=True, sharey=True).flat
    for axis, case in zip(axes, cases, strict=False):
        found = curves(rows, case)
        rounds = np.arange(found.shape[1])
        low, high = np.quantile(found, [0.1, 0.9], axis=0)
        axis.fill_between(rounds, low, high, alpha=0.2, label="EM, 10% to 90% of scenes")
        axis.plot(rounds, found.mean(axis=0), label="EM, mean")
        for arm, colour in KEPT.items():
            mean, _, scenes = interval(values(rows, arm, [case]))
            if scenes:
                axis.axhline(mean, color=colour, linestyle="--", label=TITLES[arm])
        axis.set(title=f"{case} ({len(found)} scenes)", xlabel="round")
        axis.grid(alpha=0.3)
    first = figure.axes[0]
    first.set(ylabel="mask IoU", ylim=(None, 1))
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def draw_gain(rows: list[Row], cases: Sequence[str], path: Path) -> None:
    """Gain of EM over `fixed` against the start: a dot a run, and a mean smoothed by a Gaussian."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    dots = []
    for index, case in enumerate(cases):
        start, end = values(rows, "fixed", [case]), values(rows, "em", [case])
        own = np.array([(start[run], end[run] - start[run]) for run in start])
        axis.scatter(own[:, 0], own[:, 1], s=12, alpha=0.6, color=f"C{index}", label=case)
        dots.append(own)
    x, y = np.concatenate(dots).T
    at = np.linspace(x.min(), x.max(), 200)
    weight = np.exp(-(((at[:, None] - x) / 0.05) ** 2) / 2)
    mean = np.where(weight.sum(axis=1) >= 3, weight @ y / weight.sum(axis=1), np.nan)
    axis.plot(at, mean, color="black", label="smoothed mean")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="mask IoU at the start", ylabel="gain of EM over fixed masks")
    axis.set_title(f"{len(x)} runs")
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=100)


def check_starts(rows: list[Row]) -> None:
    """Fail if `fixed` runs, which read_once goes on from, start from other masks than `em`."""
    em, once = (
        {(r["case"], r["scene"], r["seed"]): r["given"][0] for r in rows if r["arm"] == arm}
        for arm in ("em", "read_once")
    )
    other = [run for run in em.keys() & once.keys() if em[run] != once[run]]
    if other:
        raise SystemExit(f"Expected the same first masks with and without EM; not so in {other}.")


def text(rows: list[Row], cases: Sequence[str]) -> list[str]:
    """The report."""
    counts = ", ".join(f"{case} {interval(values(rows, 'em', [case]))[2]}" for case in cases)
    return [
        "# Does EM pay?",
        "",
        f"{len(rows)} runs; scenes with the default EM: {counts}. Mask IoU in the prompt's order, mean "
        "over concepts, seeds and scenes, with 95% intervals over scenes and the number of scenes in "
        "brackets; see benchmarks/em.py.",
        "",
        *overview(rows, cases),
        "By the better assignment, where concepts are told apart by their place alone:",
        "",
        *overview(rows, [case for case in cases if case in BY_PLACE], "best"),
        *("## What was aimed at", "", *aims(rows)),
        *("## Gain of the default EM", "", *gains(rows)),
        *("## Concepts lost", "", f"Concepts that end below an IoU of {IS_LOST}, of how many.", ""),
        *lost_table(rows),
        *("## Named but absent", "", *absence(rows)),
        *("## Curves", "", *curve_lines(rows, cases)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS / "em_runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = read_rows(args.runs)
    check_starts(rows)
    cases = [case for case in LEARNED if values(rows, "em", [case])]
    if not cases:
        raise SystemExit(f"No run of the arm em in {args.runs}.")
    lines = text(rows, cases)
    (args.out / "em.md").write_text("\n".join(lines))
    draw_curves(rows, cases, args.out / "em.png")
    draw_gain(rows, cases, args.out / "em_gain.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
