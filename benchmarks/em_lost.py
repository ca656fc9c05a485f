"""The runs of EM in which a concept was lost, as pictures: results/em_lost.png.

    python benchmarks/em_lost.py

Of each scene in which em.py's `em` lost a concept, the first seed that did: the picture, its true masks, the
first masks and those of the end, with the prompt and what went wrong. The runs are made again, since the
rows have no masks.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from em import (
    RESULTS,
    Row,
    of_set,
    one_name,
    pictures_of,
    problem_of,
    read_rows,
    settings_of,
    start,
)
from em_table import IS_LOST, LEARNED
from jaxtyping import Bool
from pictures_sheet import small
from PIL import Image
from torch import Tensor

from em_core.demo.rendering import SIZE, render
from em_core.masks.measures import iou
from em_core.pictures import to_image
from em_core.runs.runner import run
from em_core.show.drawing import overlay, sheet

WIDTH = 40
"""Characters in a line of text."""
TITLES = ("picture", "true masks", "first masks", "masks in the end")


def lost_runs(rows: Sequence[Row]) -> list[Row]:
    """The first run of each scene that lost a concept."""
    lost = [r for r in rows if r["arm"] == "em" and min(r["given"][-1], default=1.0) < IS_LOST]
    lost.sort(key=lambda row: (LEARNED.index(row["case"]), row["scene"], row["seed"]))
    return list({(row["case"], row["scene"]): row for row in reversed(lost)}.values())[::-1]


def fault(
    mask: Bool[Tensor, "H W"],
    others: Mapping[str, Bool[Tensor, "H W"]],
    things: Bool[Tensor, "n H W"],
) -> str:
    """What a mask that is not its concept's has instead.

    Args:
        others: true masks of the other concepts.
        things: those of all things, named or not.
    """
    if not mask.any():
        return "nothing"
    for name, other in others.items():
        if iou(mask, other) >= IS_LOST:
            return f"what {name} is"
    if (iou(things, mask.expand_as(things)) >= IS_LOST).any():
        return "a thing that is not named"
    return "several things" if ((things & mask).flatten(1).any(dim=1).sum() > 1) else "a part"


def shown(row: Row) -> dict[str, list[Image.Image]]:
    """The lines of a run, one for each picture in which a concept is lost."""
    case, scene, seed = row["case"], row["scene"], row["seed"]
    pictures = pictures_of(case, scene)
    examples = one_name(scene) if case == "one" else of_set(case, scene)
    problem = problem_of(examples, settings_of("em"), (case, scene, seed, "em"))
    first, lines = start(problem), {}
    last = None if first is None else run(problem, first, [])
    for number, (picture, prepared) in enumerate(zip(pictures, problem.pictures, strict=True)):
        truth = torch.stack([prepared.truth[name] for name in prepared.names])
        begun, ended = (
            torch.zeros_like(truth) if state is None else state.pictures[number].labels
            for state in (first, last)
        )
        lost = (iou(ended, truth) < IS_LOST).tolist()
        if not any(lost):
            continue
        blank = np.zeros((SIZE, SIZE, 3), np.float32)
        things = torch.from_numpy(render(picture.objects, blank)[1])
        said = [
            f"{name} has "
            + fault(mask, {n: prepared.truth[n] for n in prepared.names if n != name}, things)
            for name, mask, so in zip(prepared.names, ended, lost, strict=True)
            if so
        ]
        image = prepared.example.picture
        title = f"{case} {scene}, seed {seed}: {'; '.join(said)}."
        wrapped = [
            line for text in (title, str(prepared.example.prompt)) for line in wrap(text, WIDTH)
        ]
        lines["\n".join(wrapped)] = [
            to_image(image),
            *(overlay(image, m, 2) for m in (truth, begun, ended)),
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS / "em_runs.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines: dict[str, list[Image.Image]] = {}
    for row in lost_runs(read_rows(args.runs)):
        lines |= shown(row)
        print(*list(lines)[-1:])
    small(sheet(lines, TITLES, side=96), args.out / "em_lost.png")


if __name__ == "__main__":
    main()
