"""Sheets of the pictures that pictures.py drew: what the figures of pictures.md look like.

    python benchmarks/pictures_sheet.py

For each arm results/pictures/<arm>.png: of each kind of prompt the best, the median and the worst picture by
their score, each beside the picture that was learned from. And results/pictures/same_seeds.png: the same
scenes and the same seeds in all arms.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from em import read_rows
from pictures import ARMS, DRAWINGS, MAIN, RESULTS, Row, strip
from PIL import Image

from em_core.demo.rendering import SIZE
from em_core.demo.scenes import concept_scene
from em_core.show.drawing import sheet

RANKS = ("best", "median", "worst")


def drawing(row: Row, kind: str, index: int, folder: Path) -> Image.Image:
    """One picture of a run."""
    whole = Image.open(strip((row["set"], row["scene"], row["seed"], row["arm"]), folder))
    top, left = list(row["pictures"]).index(kind) * SIZE, index * SIZE
    return whole.crop((left, top, left + SIZE, top + SIZE))


def learned_from(row: Row) -> Image.Image:
    """The picture of a run's scene."""
    return Image.fromarray(concept_scene(row["scene"], row["set"]).image)


def ranked(rows: Sequence[Row], kind: str) -> list[tuple[Row, int]]:
    """The best, the median and the worst picture of a kind, as run and number."""
    found = [
        (each[row["fields"].index("score")], index, number)
        for number, row in enumerate(rows)
        for index, each in enumerate(row["pictures"].get(kind, []))
    ]
    found.sort(reverse=True)
    places = (0, len(found) // 2, len(found) - 1)
    return [(rows[found[place][2]], found[place][1]) for place in places]


def of_arm(rows: Sequence[Row], folder: Path) -> Image.Image:
    """The sheet of an arm."""
    lines: dict[str, list[Image.Image]] = {}
    for kind in dict.fromkeys(kind for row in rows for kind in row["pictures"]):
        lines[kind] = [
            image
            for row, index in ranked(rows, kind)
            for image in (learned_from(row), drawing(row, kind, index, folder))
        ]
    titles = [title for rank in RANKS for title in ("learned from", rank)]
    return sheet(lines, titles, side=80)


def same_seeds(rows: Sequence[Row], arms: Sequence[str], folder: Path) -> Image.Image:
    """The first scene of each set in all arms that have it: both together and elsewhere."""
    first = min(row["scene"] for row in rows)
    shown = sorted({(row["set"], row["scene"]) for row in rows if row["scene"] == first})
    by_key = {(r["arm"], r["set"], r["scene"]): r for r in rows if r["seed"] == 0}
    blank = Image.new("RGB", (SIZE, SIZE), "white")
    lines: dict[str, list[Image.Image]] = {"learned from": []}
    for set_, scene in shown:
        picture = Image.fromarray(concept_scene(scene, set_).image)
        lines["learned from"] += [picture, blank, blank, blank]
    for arm in arms:
        lines[arm] = []
        for set_, scene in shown:
            row = by_key.get((arm, set_, scene))
            for kind, index in (
                ("together", 0),
                ("together", 1),
                ("elsewhere", 0),
                ("elsewhere", 1),
            ):
                lines[arm].append(drawing(row, kind, index, folder) if row else blank)
    titles = [f"{set_} {kind}" for set_, _ in shown for kind in ("together", "", "elsewhere", "")]
    return sheet(lines, titles, side=80)


def small(image: Image.Image, path: Path) -> None:
    """Write a sheet with 128 colours, a third of its size."""
    image.quantize(128).save(path, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS / "pictures_runs.jsonl")
    parser.add_argument("--folder", type=Path, default=DRAWINGS)
    parser.add_argument("--out", type=Path, default=RESULTS / "pictures")
    args = parser.parse_args()
    rows = read_rows(args.runs)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    args.out.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        of_this = [row for row in rows if row["arm"] == arm]
        small(of_arm(of_this, args.folder), args.out / f"{arm}.png")
    main_arms = [arm for arm in arms if arm in MAIN]
    small(same_seeds(rows, main_arms, args.folder), args.out / "same_seeds.png")


if __name__ == "__main__":
    main()
