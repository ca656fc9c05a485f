"""Does EM pay? Mask IoU of every arm over scenes of held-out concepts, from the same starts.

    python benchmarks/em.py --scenes 24 --seeds 3 --workers 2

Runs are appended to results/em_runs.jsonl and never repeated; the table (results/em.md) and the
curves (results/em.png) are made from all of them. Scenes 1000 and up are for this benchmark alone.

The sets are the demo world's, A to I. Where words do not tell the concepts apart (C, D, E), which is
which is open, and every IoU is that of the best assignment. The arm `em_one_start` takes the first
random draw instead of the best of several; it is run on D alone, whose concepts have no words.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.scenes import ALIKE, SETS, concept_scene
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import iou
from em_core.method.loop import StepEvent
from em_core.method.maps import attention_masks
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.presets import em_settings, literal
from em_core.runs.runner import run
from em_core.settings import EMSettings

RESULTS = Path(__file__).parent / "results"
FIRST_SCENE = 1000


def arms(settings: EMSettings) -> dict[str, EMSettings]:
    """What is compared. `read_once` and `words` are read off other runs' models; see `controls`."""
    masks = settings.masks
    return {
        "em": settings,
        "fixed": replace(settings, mode="fixed"),
        "fixed_literal": replace(literal(settings), mode="fixed", steps=1),
        "em_literal": literal(settings),
        "em_one_start": replace(settings, random_starts=1),
        "em_lenient": replace(settings, masks=replace(masks, acceptance=0.9)),
        "em_no_crf": replace(settings, masks=replace(masks, crf=None)),
        "em_no_attention_loss": replace(settings, attention_weight=0.0),
        "em_no_masked_loss": replace(settings, masked_loss=False),
    }


def examples_for(set_: str, scene: int) -> list[Example]:
    """Pictures, prompts and true masks of a scene of the benchmark."""
    return [example_of(picture) for picture in concept_scene(FIRST_SCENE + scene, set_).pictures]


def mean_iou(problem: Problem, labels: Sequence[torch.Tensor], set_: str) -> float:
    """Mean over concepts and pictures; where words tell nothing apart, of the best assignment."""
    found = []
    for prepared, of_picture in zip(problem.pictures, labels, strict=True):
        truth = torch.stack([prepared.truth[name] for name in prepared.names])
        same = range(len(truth))
        orders = permutations(same) if set_ in ALIKE else [same]
        found.append(max(float(iou(of_picture[list(o)], truth).mean()) for o in orders))
    return sum(found) / len(found)


def em_passes(settings: EMSettings) -> int:
    """Attention maps that an EM run averages: the start's, the refreshes', and the M-steps' in range."""
    low, high = settings.masks.timesteps
    rounds = settings.steps // settings.e_step_every
    own = round(settings.steps * settings.batch * (high - low)) if settings.free_statistics else 0
    return settings.masks.init_timesteps + rounds * settings.refresh + own


def read_off(problem: Problem, state: RunState, set_: str) -> float:
    """IoU of masks read once from the state's vectors, with as many passes as EM averages."""
    g = torch.Generator().manual_seed(problem.settings.seed + 7)
    masks, passes = problem.settings.masks, em_passes(replace(problem.settings, mode="em"))
    estimates = [
        attention_masks(problem.host, prepared, state.vectors, masks, passes, g)[1]
        for prepared in problem.pictures
    ]
    return mean_iou(problem, [estimate.masks for estimate in estimates], set_)


@lru_cache
def demo_host() -> DiffusersHost:
    """The demo model, loaded once in each process; no arm changes it."""
    return load_host("demo")


def one(task: tuple[str, int, int, str]) -> list[dict[str, Any]]:
    """One run; the fixed arm gives its two controls too."""
    set_, scene, seed, arm = task
    torch.set_num_threads(1)
    host = demo_host()
    settings = em_settings(host.identity().family)
    # Random starts come from the seed; two scenes must not share them.
    own_seed = 100 * scene + seed if set_ == "D" else seed
    chosen = replace(arms(settings)[arm], seed=own_seed)
    problem = prepare(host, examples_for(set_, scene), chosen)
    state = initialise(problem)

    def now(state: RunState) -> float:
        return mean_iou(problem, [picture.labels for picture in state.pictures], set_)

    row = {"set": set_, "scene": scene, "seed": seed, "start": now(state)}
    rows = []
    if arm == "fixed":
        rows.append(row | {"arm": "words", "final": read_off(problem, state, set_)})
    curve = [now(state)]

    def follow(event: StepEvent, state: RunState) -> None:
        if event.masks and event.phase == "em":
            curve.append(now(state))

    state = run(problem, state, [follow])
    rows.append(row | {"arm": arm, "final": curve[-1], "curve": curve})
    if arm == "fixed":
        rows.append(row | {"arm": "read_once", "final": read_off(problem, state, set_)})
    return rows


def tasks(args: argparse.Namespace, done: set[tuple]) -> Iterator[tuple[str, int, int, str]]:
    """What has not been run yet, the main arms first."""
    for arm, seed, scene, set_ in product(
        args.arms, range(args.seeds), range(args.scenes), args.sets
    ):
        if arm == "em_one_start" and set_ != "D":
            continue
        if (set_, scene, seed, arm) not in done:
            yield set_, scene, seed, arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--arms", nargs="+", default=list(arms(EMSettings())))
    parser.add_argument("--runs", type=Path, default=RESULTS / "em_runs.jsonl")
    args = parser.parse_args()
    rows = (
        [json.loads(line) for line in args.runs.read_text().splitlines()]
        if args.runs.exists()
        else []
    )
    done = {(r["set"], r["scene"], r["seed"], r["arm"]) for r in rows}
    todo = list(tasks(args, done))
    with (
        multiprocessing.get_context("spawn").Pool(args.workers) as pool,
        args.runs.open("a") as file,
    ):
        for i, new in enumerate(pool.imap_unordered(one, todo)):
            for row in new:
                file.write(json.dumps(row) + "\n")
            file.flush()
            print(
                f"{i + 1}/{len(todo)}",
                new[-1]["set"],
                new[-1]["arm"],
                round(new[-1]["final"], 3),
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
