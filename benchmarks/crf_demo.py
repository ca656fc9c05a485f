"""The demo preset against others on first masks of demo scenes: mean IoU by set.

    python benchmarks/crf_demo.py

Masks are read off the demo model's attention under the scenes' words; no set whose masks need tokens
learned first is among them. Two ranges of seeds: the presets were tuned on the first. Results:
benchmarks/results/crf_demo.md.
"""

import statistics
from dataclasses import replace
from itertools import product

import torch
from crf_choice import Case, scene_cases
from crf_data import table, write

from em_core.masks.crf import CUTLER, DEMO, LOCAL_COLOUR, CRFSettings

SETS = "ABCFGHI"
SEEDS = {"tuned on": range(9), "fresh": range(20, 28)}
WITHOUT = replace(
    DEMO, colour_weight=0.0, iterations=10, gaussian_weight=2.0, bilateral_theta_xy=12.0
)
WAYS: dict[str, CRFSettings] = {
    "cutler": CUTLER,
    "local_colour": LOCAL_COLOUR,
    "demo without colour models": WITHOUT,
    "demo": DEMO,
    "demo, from maps": replace(DEMO, use_maps=True),
}


def row(name: str, cases: dict[str, list[Case]], settings: CRFSettings | None) -> list[str]:
    """Mean IoU of each set, before refinement or after, and over the sets."""
    means = [
        statistics.mean(case.score(settings) if settings else case.before() for case in cases[set_])
        for set_ in SETS
    ]
    return [name, *(f"{mean:.3f}" for mean in means), f"{statistics.mean(means):.3f}"]


def main() -> None:
    torch.set_num_threads(1)
    text = "# First masks of demo scenes: IoU before and after the CRF\n"
    for what, seeds in SEEDS.items():
        cases = scene_cases(product(SETS, seeds))
        rows = [row("before", cases, None), *(row(n, cases, each) for n, each in WAYS.items())]
        text += f"\n## Seeds {seeds[0]} to {seeds[-1]} ({what})\n\n"
        text += table(["settings", *SETS, "mean"], rows)
    write("crf_demo.md", text)
    print(text)


if __name__ == "__main__":
    main()
