"""Table of the pictures that pictures.py drew and judged: results/pictures.md.

    python benchmarks/pictures_table.py

A scene's value is its mean over prompts, drawings and seeds; means and paired differences are over scenes,
with 95% intervals by Student's t and the number of scenes in brackets. A difference is over the scenes
that both arms have, so the table can be made before all runs are there.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from em import read_rows
from em_table import Line, Runs, interval, less, markdown, shown
from pictures import ARMS, JOINT, MAIN, OWN, RESULTS, VISUAL, Row

TOGETHER = ("together", "elsewhere", "other_order")
"""Prompts of all concepts; these and the one with a known thing can mix."""
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "score": ("score", ()),
    "shape": ("shape", ()),
    "colour": ("colour", ()),
    "pattern": ("pattern", ()),
    "all there once": ("all_once", TOGETHER),
    "mixing": ("mixing", (*TOGETHER, "with_known")),
    "extra things": ("extra", ()),
    "background": ("background", ()),
    "same place": ("same_place", ()),
    "same ground": ("same_ground", ("elsewhere",)),
}
VISUAL_COLUMNS = ("score", "shape", "colour", "pattern", "background", "same place")
Aim = tuple[str, str, str, Callable[[float], bool]]


def values(
    rows: Sequence[Row], arm: str, column: str, sets: str = "", only: Collection[str] = ()
) -> Runs:
    """Scene and seed -> mean of a judgement over the prompts that it is of, or `only` some of them."""
    field, kinds = COLUMNS[column]
    kinds = tuple(only) or kinds
    found: Runs = {}
    for row in rows:
        if row["arm"] == arm and (not sets or row["set"] in sets):
            at = row["fields"].index(field)
            judged = [
                each[at]
                for kind, of_kind in row["pictures"].items()
                if not kinds or kind in kinds
                for each in of_kind
            ]
            if judged:
                found[row["set"], row["scene"], row["seed"]] = float(np.mean(judged))
    return found


def overview(rows: Sequence[Row], arms: Sequence[str], sets: str = "") -> list[str]:
    """Mean of every judgement for every arm."""
    lines: list[Line] = []
    for arm in arms:
        cells = [shown(interval(values(rows, arm, column, sets))) for column in COLUMNS]
        if any(cells):
            lines.append((f"`{arm}`", *cells))
    return markdown(("arm", *COLUMNS), lines)


def differences(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Paired differences of arms."""
    lines: list[Line] = []
    for one, other in pairs:
        cells = [
            shown(interval(less(values(rows, one, column), values(rows, other, column))), "+")
            for column in COLUMNS
        ]
        if any(cells):
            lines.append((f"`{one}` over `{other}`", *cells))
    return markdown(("difference", *COLUMNS), lines)


def visual(rows: Sequence[Row]) -> list[str]:
    """The visual condition beside its tokens: all prompts, and those of one concept, which ViCo's has."""
    arms = [arm for arm in VISUAL if any(row["arm"] == arm for row in rows)]
    lines: list[Line] = []
    for arm in arms:
        base = base_of(arm)
        for kinds in ((), tuple(OWN)):
            name = f"`{arm}` over `{base}`" + (", one concept" if kinds else "")
            cells = []
            for column in VISUAL_COLUMNS:
                pair = [values(rows, each, column, only=kinds) for each in (arm, base)]
                cells.append(shown(interval(less(*pair)), "+"))
            if kinds or ARMS[arm].visual != "vico":
                lines.append((name, *cells))
    return markdown(("difference", *VISUAL_COLUMNS), lines)


def pairs_of(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The paper's claim with each joint phase, joint phases, and each other arm against what it changes."""
    masks = ("none", "fixed", "read_once", "given")
    claim = [(f"em{more}", f"{mask}{more}") for more in JOINT for mask in masks]
    joint = [(f"{mask}{more}", mask) for more in JOINT if more for mask in ("em", *masks)]
    rest = [(arm, base_of(arm)) for arm in arms if arm not in MAIN | VISUAL]
    return [*claim, *joint, ("em+full", "em+lora"), *rest]


def base_of(arm: str) -> str:
    """The main arm that another one changes."""
    return {"none": "em", "full": "em+full"}.get(ARMS[arm].joint, "em+lora")


def aims(rows: Sequence[Row], arm: str) -> list[str]:
    """What was aimed at, as shares of the ceiling where it says so, and what an arm reaches."""

    def mean(column: str, of: str = arm, sets: str = "") -> float:
        return interval(values(rows, of, column, sets))[0]

    def of_ceiling(column: str, sets: str = "") -> float:
        return mean(column, sets=sets) / mean(column, "ceiling", sets)

    masks = arm.removeprefix("em")
    wanted: list[tuple[str, str, float, bool]] = [
        ("all there once, of the ceiling", ">= 90%", of_ceiling("all there once"), True),
        ("shape of A, of the ceiling", ">= 85%", of_ceiling("shape", "A"), True),
        ("shape of B, of the ceiling", ">= 75%", of_ceiling("shape", "B"), True),
        ("colour, of the ceiling", ">= 95%", of_ceiling("colour"), True),
        ("pattern, of the ceiling", ">= 85%", of_ceiling("pattern"), True),
        ("background, of the ceiling", ">= 95%", of_ceiling("background"), True),
        ("pictures that mix", "<= 5%", mean("mixing"), False),
    ]
    lines: list[Line] = []
    for what, aim, found, more in wanted:
        bar = float(aim.strip("<>=% ")) / 100
        reached = "yes" if (found >= bar if more else found <= bar) else "no"
        run = not np.isnan(found)
        lines.append((what, aim, f"{found:.1%}" if run else "", reached if run else "not run"))
    for other, aim, bar in (("given", ">= -.03", -0.03), ("none", ">= +.15", 0.15)):
        gain = interval(less(values(rows, arm, "score"), values(rows, other + masks, "score")))
        answer = ("yes" if gain[0] >= bar else "no") if gain[2] else "not run"
        lines.append((f"score over `{other}{masks}`", aim, shown(gain, "+"), answer))
    return markdown((f"aim, for `{arm}`", "aimed at", "found", "reached"), lines)


def by_prompt(rows: Sequence[Row], arm: str) -> list[str]:
    """Mean score, extra things and background of an arm by kind of prompt."""
    found = [row for row in rows if row["arm"] == arm]
    kinds = dict.fromkeys(kind for row in found for kind in row["pictures"])
    lines: list[Line] = []
    for kind in kinds:
        cells = []
        for field in ("score", "shape", "colour", "pattern", "extra", "background"):
            each = [
                picture[row["fields"].index(field)]
                for row in found
                for picture in row["pictures"].get(kind, [])
            ]
            cells.append(f"{np.mean(each):.2f}")
        lines.append((kind, *cells))
    return markdown(
        (f"prompt, for `{arm}`", "score", "shape", "colour", "pattern", "extra", "background"),
        lines,
    )


def text(rows: Sequence[Row]) -> list[str]:
    """The report."""
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    sets = sorted({row["set"] for row in rows})
    shown_arms = [arm for arm in (f"em{more}" for more in JOINT) if arm in arms]
    return [
        "# Are the concepts learned?",
        "",
        f"{len(rows)} runs. Judgements by the ruler, whose own errors are in ruler.md; what they mean is in "
        "benchmarks/pictures_score.py. Mean over scenes, 95% interval, number of scenes.",
        "",
        *overview(rows, arms),
        *("## What was aimed at", ""),
        *(line for arm in shown_arms for line in aims(rows, arm)),
        *("## Paired differences", "", *differences(rows, pairs_of(arms))),
        *("## The visual condition", "", *visual(rows)),
        *("## By set", ""),
        *(line for set_ in sets for line in (f"### {set_}", "", *overview(rows, arms, set_))),
        *("## By prompt", ""),
        *(line for arm in ("ceiling", *shown_arms) for line in by_prompt(rows, arm)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS / "pictures_runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "pictures.md")
    args = parser.parse_args()
    lines = text(read_rows(args.runs))
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
