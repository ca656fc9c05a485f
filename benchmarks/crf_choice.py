"""Choose the CRF's default settings on demo scenes and three photos, judge them on the fourth.

    python benchmarks/crf_choice.py

Every candidate gets masks like those from attention maps (see crf_quality.py), once with their maps and
once alone; the true masks; and first masks of the demo model on scenes that no benchmark uses. Choice is
by `worth`. Each photo in turn is left out of it, and judged by what the others chose, on other draws of
noise. Results: benchmarks/results/crf_choice.json and .md.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from crf_data import photo_folders, read_photo, table, write
from crf_quality import FIRST_DRAW, maps_for
from torch import Tensor

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.masks.crf import CUTLER, DIFFUMASK, LOCAL_COLOUR, CRFSettings, MaskRefiner, labels
from em_core.masks.measures import iou
from em_core.masks.resizing import resize
from em_core.masks.thresholds import binarise, min_max
from em_core.presets import em_settings
from em_core.runs.finding import find_masks

SIDE = 192
NOISES = (0.1, 0.3)
CHOICE_DRAWS, JUDGE_DRAWS = range(2), range(FIRST_DRAW, FIRST_DRAW + 4)
SCENES = tuple(product("ABCFHI", (10, 11)))

SOFT = replace(CUTLER, unary_strength=4.0, use_maps=True, bilateral_theta_xy=10.0)
CANDIDATES: dict[str, CRFSettings] = {
    "cutler": CUTLER,
    "diffumask": DIFFUMASK,
    "cutler, from maps": replace(CUTLER, use_maps=True),
    **{
        f"no colour models, theta_xy {xy:g}, theta_rgb {rgb:g}, weights {smooth:g} and {alike:g}, "
        f"strength {strength:g}": replace(
            SOFT,
            bilateral_theta_xy=xy,
            bilateral_theta_rgb=rgb,
            gaussian_weight=smooth,
            bilateral_weight=alike,
            unary_strength=strength,
        )
        for xy, rgb, smooth, alike, strength in (
            (20, 8, 1, 5, 4),
            (20, 8, 0, 7, 5),
            (10, 12, 0, 4, 1.5),
            (14, 20, 1, 7, 2),
            (20, 12, 2, 5, 5),
        )
    },
    **{
        f"colour weight {colour:g}, smoothness {smooth:g}, theta_xy {xy:g}, strength {strength:g}": replace(
            LOCAL_COLOUR,
            colour_weight=colour,
            gaussian_weight=smooth,
            bilateral_theta_xy=xy,
            unary_strength=strength,
        )
        for colour, smooth, xy, strength in product((1, 1.5), (3, 5), (70, 100), (1.5, 2.5, 4))
    },
}


@dataclass(frozen=True)
class Case:
    """Masks of one picture to refine, with their maps or without, and the true ones."""

    image: Tensor
    truth: Tensor
    masks: Tensor
    maps: Tensor | None

    def score(self, settings: CRFSettings) -> float:
        refined = labels(MaskRefiner(self.image, settings)(self.masks.float(), self.maps))
        return float(iou(refined, self.truth).mean())

    def before(self) -> float:
        return float(iou(self.masks, self.truth).mean())


def photo_cases(name: str, noise: float, draws: Sequence[int], with_maps: bool) -> list[Case]:
    """A photo's cases; without noise, its true masks."""
    folder = next(folder for folder in photo_folders() if folder.name == name)
    image, truth = read_photo(folder, SIDE)
    cases = []
    for draw in draws if noise else draws[:1]:
        maps = maps_for(truth, noise, draw)
        masks = truth > 0.5 if maps is None else binarise(maps, 0.5)
        cases.append(Case(image, truth > 0.5, masks, maps if with_maps else None))
    return cases


def scene_cases(scenes: Iterable[tuple[str, int]]) -> dict[str, list[Case]]:
    """First masks of demo scenes, given by set and seed, with their maps; by set."""
    host = load_host("demo")
    settings = em_settings(host.identity().family).masks
    cases: dict[str, list[Case]] = {}
    for set_, seed in scenes:
        for scene in concept_scene(seed, set_).pictures:
            example = example_of(scene)
            found = find_masks(host, example.picture, example.prompt, None, settings)
            maps = min_max(resize(found.maps, (64, 64), "map"))
            truth = torch.stack([torch.as_tensor(scene.masks[name]) for name in found.names])
            masks = binarise(maps, settings.threshold, settings.competition)
            cases.setdefault(set_, []).append(Case(example.picture, truth, masks, maps))
    return cases


def mean_score(cases: Sequence[Case], settings: CRFSettings) -> float:
    return statistics.mean(case.score(settings) for case in cases)


def gains(photo: str, settings: CRFSettings, draws: Sequence[int]) -> dict[str, float]:
    """What a photo's masks gain, by kind of input."""
    kinds = {
        f"{noise} {kind}": photo_cases(photo, noise, draws, kind == "maps")
        for noise, kind in product(NOISES, ("maps", "masks"))
    }
    kinds["true masks"] = photo_cases(photo, 0.0, draws, False)
    return {
        kind: mean_score(cases, settings) - statistics.mean(case.before() for case in cases)
        for kind, cases in kinds.items()
    }


def worth(of_photos: Sequence[dict[str, float]], of_scenes: float) -> float:
    """Mean gains at both noises, IoU on scenes, less losses: any on a photo, over .02 of true masks."""
    total = of_scenes
    for kind in of_photos[0]:
        values = [of_photo[kind] for of_photo in of_photos]
        if kind == "true masks":
            total += 5 * min(0.0, min(values) + 0.02)
        else:
            share = 0.5 if kind.startswith("0.1") else 0.25
            total += share * statistics.mean(values) + sum(min(0.0, value) for value in values)
    return total


def main() -> None:
    torch.set_num_threads(1)
    photos = [folder.name for folder in photo_folders()]
    scenes = [case for cases in scene_cases(SCENES).values() for case in cases]
    seen: dict[str, dict[str, dict[str, float]]] = {}
    on_scenes: dict[str, float] = {}
    for name, settings in CANDIDATES.items():
        seen[name] = {photo: gains(photo, settings, CHOICE_DRAWS) for photo in photos}
        on_scenes[name] = mean_score(scenes, settings)
        print(name, f"{worth(list(seen[name].values()), on_scenes[name]):.3f}", flush=True)

    def best(among: Sequence[str]) -> str:
        return max(CANDIDATES, key=lambda n: worth([seen[n][p] for p in among], on_scenes[n]))

    chosen = {photo: best([other for other in photos if other != photo]) for photo in photos}
    judged = {p: gains(p, CANDIDATES[chosen[p]], JUDGE_DRAWS) for p in photos}
    results = {"seen": seen, "scenes": on_scenes, "chosen": chosen, "judged": judged}
    write("crf_choice.json", json.dumps(results, indent=1) + "\n")
    write("crf_choice.md", report(seen, on_scenes, chosen, judged, best(photos)))


def report(
    seen: dict[str, dict[str, dict[str, float]]],
    on_scenes: dict[str, float],
    chosen: dict[str, str],
    judged: dict[str, dict[str, float]],
    overall: str,
) -> str:
    """The left-out photos' gains, then all candidates in the order of their worth."""
    kinds = list(next(iter(judged.values())))
    rows = [[p, chosen[p], *(f"{judged[p][k]:+.3f}" for k in kinds)] for p in chosen]
    means = [statistics.mean(judged[p][k] for p in chosen) for k in kinds]
    rows.append(["mean", "", *(f"{mean:+.3f}" for mean in means)])
    text = "# Choice of the CRF's settings\n\n## Left out and judged: gain in IoU\n\n"
    text += table(["photo", "chosen by the other three", *kinds], rows)
    text += f"\nChosen by all four: {overall}.\n\n## Candidates: mean and least gain over the photos\n\n"
    order = sorted(seen, key=lambda n: -worth(list(seen[n].values()), on_scenes[n]))
    cells = []
    for name in order:
        each = [[of_photo[k] for of_photo in seen[name].values()] for k in kinds]
        cells.append(
            [
                name,
                *(f"{statistics.mean(v):+.3f} ({min(v):+.3f})" for v in each),
                f"{on_scenes[name]:.3f}",
            ]
        )
    return text + table(["settings", *kinds, "demo scenes (IoU)"], cells)


if __name__ == "__main__":
    main()
