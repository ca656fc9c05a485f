"""Does EM pay? Mask IoU of every arm over scenes of two held-out concepts, from the same starts.

    python benchmarks/em.py --scenes 24 --seeds 3 --workers 2

Runs are appended to results/em_runs.jsonl and never repeated; the table (results/em.md) and the
curves (results/em.png) are made from all of them. Scenes 1000 and up are for this benchmark alone.

Sets A, B and C are the demo world's. Set D is set C without a word for the concepts: they start at
random, so which of the two is which is open, and every IoU is that of the better assignment. The arm
`em_one_start` takes the first random draw instead of the best of several; it is run on D alone.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path
from typing import Any

import torch

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import iou
from em_core.method.loop import StepEvent
from em_core.method.maps import attention_masks
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.presets import em_settings, literal
from em_core.prompts import Concept, ConceptPrompt
from em_core.runs.runner import run
from em_core.settings import EMSettings

RESULTS = Path(__file__).parent / "results"
FIRST_SCENE = 1000
SETS = ("A", "B", "C", "D")


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


def example_for(set_: str, scene: int) -> Example:
    """Picture, prompt and true masks of a scene of the benchmark."""
    example = example_of(concept_scene(FIRST_SCENE + scene, "C" if set_ == "D" else set_))
    return replace(example, prompt=without_words(example.prompt)) if set_ == "D" else example


def without_words(prompt: ConceptPrompt) -> ConceptPrompt:
    """The prompt with concepts that start at random."""
    parts = [replace(p, words="") if isinstance(p, Concept) else p for p in prompt.parts]
    return ConceptPrompt(tuple(parts))


def mean_iou(problem: Problem, labels: torch.Tensor) -> float:
    """Mean over the concepts of one picture; without words, of the better assignment."""
    prepared = problem.pictures[0]
    truth = torch.stack([prepared.truth[name] for name in prepared.names])
    named = all(concept.words for concept in problem.concepts)
    orders = [tuple(range(len(truth)))] if named else permutations(range(len(truth)))
    return max(float(iou(labels[list(order)], truth).mean()) for order in orders)


def em_passes(settings: EMSettings) -> int:
    """Attention maps that an EM run averages: the start's, the refreshes', and the M-steps' in range."""
    low, high = settings.masks.timesteps
    rounds = settings.steps // settings.e_step_every
    own = round(settings.steps * settings.batch * (high - low)) if settings.free_statistics else 0
    return settings.masks.init_timesteps + rounds * settings.refresh + own


def read_off(problem: Problem, state: RunState, passes: int) -> float:
    """IoU of masks read once from the state's vectors."""
    g = torch.Generator().manual_seed(problem.settings.seed + 7)
    prepared, masks = problem.pictures[0], problem.settings.masks
    _, estimate = attention_masks(problem.host, prepared, state.vectors, masks, passes, g)
    return mean_iou(problem, estimate.masks)


@lru_cache
def demo_host() -> DiffusersHost:
    """The demo model, loaded once a process; no arm here changes it."""
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
    problem = prepare(host, [example_for(set_, scene)], chosen)
    state = initialise(problem)
    start = mean_iou(problem, state.pictures[0].labels)
    row = {"set": set_, "scene": scene, "seed": seed}
    rows = []
    if arm == "fixed":
        rows.append(
            row
            | {
                "arm": "words",
                "start": start,
                "final": read_off(problem, state, em_passes(settings)),
            }
        )
    curve = [start]

    def follow(event: StepEvent, state: RunState) -> None:
        if event.masks and event.phase == "em":
            curve.append(mean_iou(problem, state.pictures[0].labels))

    state = run(problem, state, [follow])
    rows.append(row | {"arm": arm, "start": start, "final": curve[-1], "curve": curve})
    if arm == "fixed":
        rows.append(
            row
            | {
                "arm": "read_once",
                "start": start,
                "final": read_off(problem, state, em_passes(settings)),
            }
        )
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
