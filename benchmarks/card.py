"""What learning takes of a real graphics card at full size: memory against the estimate, and seconds.

    python benchmarks/card.py                    the table from the rows that are there
    python benchmarks/card.py --measure FOLDER   what is missing first, with a ComfyUI that is found, on a card;
                                                 the folder takes a checkpoint of up to 7 GB

Some steps of each kind and plan run as LearnConcepts and LearnVisualCondition run them, on random weights
(tests/host/scripts/on_card.py). *Allocated* is the peak of PyTorch's tensors, *reserved* what it holds of the
card for them. While they run, only as much of the card is free as the plan says it needs, so that a plan that
needs more fails here. Rows are appended to results/card.jsonl and never repeated.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from memory import GIB, LEARNED

from em_core.model.memory import FAMILIES

ROOT = Path(__file__).parents[1]
ROWS, TABLE = (ROOT / "benchmarks" / "results" / f"card.{end}" for end in ("jsonl", "md"))
STEPS = 6
PLANS, WHOLE = ("half", "halfr", "fp8"), ("float32", "float32r")
SIZES = (("sd1", 512), ("sdxl", 1024), ("sd2", 768))
GRID = (
    *(
        f"{f}-{s}-{kind}-{p}"
        for f, s in SIZES
        for kind in ("none", "lora", "visual")
        for p in PLANS
    ),
    *(f"{f}-{s}-cross_attention-{p}" for f, s in SIZES for p in WHOLE),
    *(f"sd1-512-full-{p}" for p in WHOLE),
)
HEAD = """# What learning takes of a real card

{card}, torch {torch}: ComfyUI's own classes with random weights in fp16,
batch 1, two concepts. Seconds are medians of {steps} steps; an E-step comes every 20 steps. GiB: *estimated* is
what the plans go by, *allocated* the peak of tensors, *reserved* what PyTorch held of the card, *free* what
has to be free for the plan to be chosen. No more than that was free: *fits* says whether it ran.

| family | pixels | learns | plan | s a step | s an E-step | estimated | allocated | reserved | free | fits |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def measure(folder: Path) -> None:
    """Run what is missing of the grid in ComfyUI's Python, family by family."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from found import FOUND, run_script

    if not FOUND:
        sys.exit("No ComfyUI found; see CONTRIBUTING.md.")
    os.environ["VISUAL_CONCEPTS_DEVICE"] = "cuda"
    done = {case_of(row) for row in read_rows(ROWS)}
    for family, _ in SIZES:
        todo = [case for case in GRID if case.startswith(f"{family}-") and case not in done]
        said = run_script(FOUND[0], "on_card.py", folder, *todo, timeout=7200) if todo else ""
        with ROWS.open("a", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line in said.splitlines() if line.startswith("{"))


def case_of(row: dict[str, Any]) -> str:
    """The case of a row, as the grid has it."""
    plan, _, recomputing = row["plan"].partition(", ")
    short = plan if plan == "fp8" else plan + "r" * bool(recomputing)
    return f"{row['family']}-{row['side']}-{row['kind']}-{short}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write results/card.md."""
    first = rows[0]
    text = HEAD.format(card=first["card"], torch=first["torch"], steps=STEPS)
    for row in rows:
        sizes = (row[name] / GIB for name in ("estimate", "allocated", "reserved", "need"))
        times = ("" if row[n] is None else f"{row[n]:.3f}" for n in ("step_s", "e_step_s"))
        cells = [
            FAMILIES[row["family"]], str(row["side"]), LEARNED[row["kind"]], row["plan"],
            *times, *(f"{size:.1f}" for size in sizes), "yes" if row["fits"] else "no",
        ]  # fmt: skip
        text += f"| {' | '.join(cells)} |\n"
    off = max((row["allocated"] / row["estimate"] - 1 for row in rows), key=abs)
    fit = sum(row["fits"] for row in rows)
    text += (
        f"\n{fit} of {len(rows)} cases ran in what the plan wants free. The peak of tensors is off the "
        f"estimate by {off:+.1%} at most.\n"
    )
    TABLE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--measure", type=Path, metavar="FOLDER", help="measure what is missing first"
    )
    folder = parser.parse_args().measure
    if folder is not None:
        measure(folder)
    write_table(read_rows(ROWS))


if __name__ == "__main__":
    main()
