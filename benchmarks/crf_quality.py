"""Does the CRF help? IoU before and after, on masks like those from attention maps.

    python benchmarks/crf_quality.py

True masks are pooled to 16x16, blurred, made noisy, enlarged and thresholded at one half; "noise 0" is
the true masks themselves, as if painted. Results: benchmarks/results/crf_quality.json, .md and .png.
Settings are chosen on other draws of noise; see crf_choice.py.
"""

import argparse
import json
import statistics
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from crf_data import RESULTS, photo_folders, read_photo, table, write
from torch import Tensor

from em_core.masks.crf import CUTLER, LOCAL_COLOUR, CRFSettings, MaskRefiner, labels
from em_core.masks.measures import iou
from em_core.masks.thresholds import binarise
from em_core.pictures import save_image
from em_core.show.drawing import overlay, sheet

SIDE = 512
FIRST_DRAW = 100
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16
WAYS: dict[str, CRFSettings] = {
    "cutler": CUTLER,
    "local_colour, masks only": replace(LOCAL_COLOUR, use_maps=False),
    "local_colour": LOCAL_COLOUR,
    "local_colour at 128": replace(LOCAL_COLOUR, working_size=128),
}


def attention_like(masks: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Full-size soft maps from 16x16 maps of true masks, blurred and with Gaussian noise added."""
    small = F.adaptive_avg_pool2d(masks[None], 16)[0]
    padded = F.pad(small[:, None], (1, 1, 1, 1), mode="replicate")
    small = F.conv2d(padded, BLUR)[:, 0]
    small = small + noise * torch.randn(small.shape, generator=generator)
    return F.interpolate(small[None], masks.shape[-2:], mode="bilinear")[0].clamp(0, 1)


def maps_for(truth: Tensor, noise: float, draw: int) -> Tensor | None:
    """Maps like those from attention; none without noise, where the true masks are given."""
    generator = torch.Generator().manual_seed(draw)
    return attention_like(truth, noise, generator) if noise else None


def scores(
    refiners: dict[str, MaskRefiner], truth: Tensor, maps: Tensor | None, joint: bool
) -> dict[str, float]:
    """Mean IoU over the objects of one picture, before refinement and after each kind of it."""
    before = truth > 0.5 if maps is None else binarise(maps, 0.5, competition=joint)
    found = {"before": before}
    for name, refine in refiners.items():
        found[name] = labels(refine(before.float(), maps), joint)
    return {name: float(iou(masks, truth > 0.5).mean()) for name, masks in found.items()}


def evaluate(noises: list[float], draws: int) -> list[dict[str, object]]:
    """IoU for each photo, noise and draw, jointly and alone."""
    rows: list[dict[str, object]] = []
    for folder, joint in product(photo_folders(), (True, False)):
        image, truth = read_photo(folder, SIDE)
        refiners = {n: MaskRefiner(image, replace(each, joint=joint)) for n, each in WAYS.items()}
        for noise in noises:
            for draw in range(FIRST_DRAW, FIRST_DRAW + (draws if noise else 1)):
                found = scores(refiners, truth, maps_for(truth, noise, draw), joint)
                rows.append({"photo": folder.name, "noise": noise, "joint": joint, **found})
    return rows


def summary(rows: list[dict[str, object]]) -> str:
    """Mean IoU by noise, jointly and alone, over all photos and for each."""
    names = ["before", *WAYS]
    groups: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for row in rows:
        kind = "one CRF for all" if row["joint"] else "one CRF each"
        for photo in ("all", str(row["photo"])):
            groups.setdefault((photo, f"noise {row['noise']}", kind), []).append(row)
    cells = [
        [
            *key,
            *(f"{statistics.mean(float(str(row[name])) for row in group):.3f}" for name in names),
        ]
        for key, group in sorted(groups.items())
    ]
    return table(["photo", "input", "labels", *names], cells)


def picture(noise: float) -> None:
    """Save a sheet of true masks, input masks and masks refined jointly in two ways.

    The photographs are others' work, and stay where they are: the masks are drawn without them.
    """
    rows = {}
    for folder in photo_folders():
        image, truth = read_photo(folder, SIDE)
        maps = attention_like(truth, noise, torch.Generator().manual_seed(FIRST_DRAW))
        before = binarise(maps, 0.5)
        after = [
            labels(MaskRefiner(image, settings)(before.float(), maps))
            for settings in (CUTLER, LOCAL_COLOUR)
        ]
        rows[folder.name] = [
            overlay(torch.full_like(image, 0.6), masks) for masks in (truth > 0.5, before, *after)
        ]
    titles = ["true masks", f"before, noise {noise}", "cutler", "local_colour"]
    save_image(RESULTS / "crf_quality.png", sheet(rows, titles, side=200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--draws", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = evaluate(args.noises, args.draws)
    text = "# IoU before and after the CRF\n\n"
    text += f"{SIDE}x{SIDE}; mean over objects and {args.draws} draws of noise.\n\n"
    text += summary(rows)
    write("crf_quality.json", json.dumps(rows, indent=1) + "\n")
    write("crf_quality.md", text)
    picture(max(args.noises))
    print(text)


if __name__ == "__main__":
    main()
