"""Does the CRF help? IoU before and after, on masks like those from attention maps.

    python benchmarks/crf_quality.py

True masks are pooled to 16x16, blurred, made noisy, enlarged and thresholded at one half. Results:
benchmarks/results/crf_quality.json, .md and .png.
"""

import argparse
import importlib.util
import json
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from crf_data import RESULTS, photo_folders, read_photo, table, write
from torch import Tensor

from em_core.masks.crf import CUTLER, CRFSettings, MaskRefiner, labels
from em_core.masks.measures import iou
from em_core.masks.thresholds import binarise
from em_core.pictures import save_image
from em_core.show.drawing import overlay, sheet

SIDE = 512
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16


def attention_like(masks: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Full-size soft maps from 16x16 maps of true masks, blurred and with Gaussian noise added."""
    small = F.adaptive_avg_pool2d(masks[None], 16)[0]
    padded = F.pad(small[:, None], (1, 1, 1, 1), mode="replicate")
    small = F.conv2d(padded, BLUR)[:, 0]
    small = small + noise * torch.randn(small.shape, generator=generator)
    return F.interpolate(small[None], masks.shape[-2:], mode="bilinear")[0].clamp(0, 1)


def ways() -> dict[str, CRFSettings]:
    """Settings by name, with pydensecrf's if it is installed."""
    sizes: dict[str, CRFSettings] = {
        "torch": CUTLER,
        "torch at 256": replace(CUTLER, working_size=256),
        "torch at 128": replace(CUTLER, working_size=128),
    }
    if importlib.util.find_spec("pydensecrf") is not None:
        sizes["pydensecrf"] = replace(CUTLER, backend="pydensecrf")
    return sizes


def one_photo(image: Tensor, truth: Tensor, maps: Tensor, joint: bool) -> dict[str, float]:
    """Mean IoU over the objects of one picture, before refinement and after each kind of it."""
    before = binarise(maps, 0.5, competition=joint)
    found = {"before": before}
    for name, settings in ways().items():
        refine = MaskRefiner(image, replace(settings, joint=joint))
        found[name] = labels(refine(before.float()), joint)
    return {name: float(iou(masks, truth > 0.5).mean()) for name, masks in found.items()}


def evaluate(noises: list[float], seeds: int) -> list[dict[str, object]]:
    """IoU for each photo, noise and seed, jointly and alone."""
    rows: list[dict[str, object]] = []
    for folder in photo_folders():
        image, truth = read_photo(folder, SIDE)
        for noise in noises:
            for seed in range(seeds):
                maps = attention_like(truth, noise, torch.Generator().manual_seed(seed))
                for joint in (True, False):
                    scores = one_photo(image, truth, maps, joint)
                    rows.append({"photo": folder.name, "noise": noise, "joint": joint, **scores})
    return rows


def summary(rows: list[dict[str, object]]) -> str:
    """Mean IoU by noise, jointly and alone, over all photos and for each."""
    names = ["before", *ways()]
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
    """Save a sheet of true masks, input masks and jointly refined masks."""
    rows = {}
    for folder in photo_folders():
        image, truth = read_photo(folder, SIDE)
        maps = attention_like(truth, noise, torch.Generator().manual_seed(0))
        before = binarise(maps, 0.5)
        refined = labels(MaskRefiner(image)(before.float()))
        rows[folder.name] = [overlay(image, masks) for masks in (truth > 0.5, before, refined)]
    titles = ["true masks", f"before, noise {noise}", "after"]
    save_image(RESULTS / "crf_quality.png", sheet(rows, titles, side=200))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noises", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = evaluate(args.noises, args.seeds)
    text = "# IoU before and after the CRF\n\n"
    text += (
        f"{SIDE}x{SIDE}, CutLER's numbers; mean over objects and {args.seeds} draws of noise.\n\n"
    )
    text += summary(rows)
    write("crf_quality.json", json.dumps(rows, indent=1) + "\n")
    write("crf_quality.md", text)
    picture(max(args.noises))
    print(text)


if __name__ == "__main__":
    main()
