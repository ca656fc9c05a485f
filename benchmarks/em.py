"""Does EM pay? Mask IoU of every arm over scenes of held-out concepts, from the same starts.

    python benchmarks/em.py --workers 2

Runs are appended to results/em_runs.jsonl and never repeated. em_table.py makes table and figures of
them, also before all are there: each scene is run in every case before the next one, `em` first.
Scenes 1000 and up are for this benchmark alone; methods are tuned on others.

The cases are the demo world's sets A to I; `one`, two things of which one is named; `discover`, the
things of A, B, C, E, F and G without a word; and `absent`, a name of something that the picture does not
show, with the same pictures under their own prompts beside it. A row has the IoU of every concept at the
start and after each round, in the prompt's order (`given`) and by the better assignment (`best`). A run that
finds nothing at all has IoU 0; where a run says that one of several concepts is missing, its mask counts
as it stands. What `fixed` masks give is the first value of `em`.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.rendering import render
from em_core.demo.scenes import Pictures, concept_scene
from em_core.demo.vocabulary import SHAPES
from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import iou
from em_core.masks.regions import best_assignment
from em_core.method.e_step import e_step
from em_core.method.loop import StepEvent, by_name, mean_of, not_found, not_seen
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.presets import em_settings, literal
from em_core.prompts import ConceptPrompt
from em_core.runs.finding import discover
from em_core.runs.runner import run
from em_core.settings import EMSettings

RESULTS = Path(__file__).parent / "results"
FIRST_SCENE = 1000
SETS, DISCOVER_SETS = "ABCDEFGHI", "ABCEFG"
ABSENT, ABSENT_SETS = "absent", "ABCDEF"
Row = dict[str, Any]
Task = tuple[str, int, int, str]
# Number of seeds of each arm, in the order of work; those called first_ learn nothing.
ARMS = {
    "em": 2,
    "read_once": 2,
    "first_literal": 1,
    "first_no_regions": 1,
    "first_no_rivals": 1,
    "first_no_regions_no_rivals": 1,
    "em_no_crf": 1,
    "em_no_attention_loss": 1,
    "em_literal": 1,
}


def settings_of(arm: str) -> EMSettings:
    """The settings of an arm."""
    settings = em_settings(demo_host().identity().family)

    def masks(**changes: Any) -> EMSettings:
        return replace(settings, masks=replace(settings.masks, **changes))

    return {
        "em": settings,
        "read_once": replace(settings, mode="fixed"),
        "first_literal": literal(settings),
        "first_no_regions": masks(regions=None),
        "first_no_rivals": masks(rivals=""),
        "first_no_regions_no_rivals": masks(regions=None, rivals=""),
        "em_no_crf": masks(crf=None),
        "em_no_attention_loss": replace(settings, attention_weight=0.0),
        "em_literal": literal(settings),
    }[arm]


@lru_cache
def demo_host() -> DiffusersHost:
    """The demo model, loaded once in each process; no arm changes it."""
    torch.set_num_threads(1)
    return load_host("demo")


def of_set(set_: str, scene: int) -> list[Example]:
    """Pictures, prompts and true masks of a scene of the benchmark."""
    return [example_of(picture) for picture in pictures_of(set_, scene)]


def pictures_of(case: str, scene: int) -> Pictures:
    """The pictures of a scene of a set; those of `one` are of A and B, in turn."""
    return concept_scene(FIRST_SCENE + scene, "AB"[scene % 2] if case == "one" else case).pictures


def one_name(scene: int) -> list[Example]:
    """A scene of A or B, in turn, whose prompt names one of its two things."""
    (picture,) = pictures_of("one", scene)
    concept = ConceptPrompt.parse(picture.prompt).concepts[0]
    return [example_of(replace(picture, prompt=f"a photo of {concept} on {picture.background}"))]


def absent_name(arm: str, scene: int) -> Example:
    """A scene of A to F, in turn, whose prompt names a shape that it does not have.

    The shape is named `alone`, or `added` to what the picture shows; `present` names that alone.
    """
    number, place = divmod(scene, len(ABSENT_SETS))
    picture = concept_scene(FIRST_SCENE + number, ABSENT_SETS[place]).only
    others = [shape for shape in SHAPES if shape not in {each.shape for each in picture.objects}]
    mark = f"<{ABSENT}:{others[number % len(others)]}>"
    there, ground = picture.prompt.rsplit(" on ", 1)
    prompts = {
        "alone": f"a photo of {mark}",
        "added": f"{there} and {mark} on {ground}",
        "present": picture.prompt,
    }
    return example_of(replace(picture, prompt=prompts[arm]))


def problem_of(examples: Sequence[Example], settings: EMSettings, task: Task) -> Problem:
    """The run's problem; no two scenes or seeds have the same random numbers."""
    _, scene, seed, _ = task
    return prepare(demo_host(), examples, replace(settings, seed=100 * scene + seed))


def start(problem: Problem) -> RunState | None:
    """The first masks, or None where nothing was found at all."""
    try:
        return initialise(problem)
    except UserError as error:
        if "found in the pictures" in str(error):
            return None
        raise


def learned(examples: Callable[[int], list[Example]], task: Task) -> Row:
    """IoU of a run at its start and after every round."""
    scene, arm = task[1], task[3]
    problem = problem_of(examples(scene), settings_of(arm), task)
    names = [concept.name for concept in problem.concepts]
    state = start(problem)
    if state is None:
        nothing = [[0.0] * len(names)]
        return {"names": names, "given": nothing, "best": nothing, "missing": [names, names]}
    every, missing = settings_of("em").e_step_every, [list(not_found(problem, state))]
    curve = [scores(problem, state)]

    def follow(event: StepEvent, state: RunState) -> None:
        if event.masks and event.phase == "em" and event.step % every == 0:
            curve.append(scores(problem, state))

    if not arm.startswith("first"):
        state = run(problem, state, [follow])
    if arm == "read_once":
        state = read_once(problem, state)
        curve.append(scores(problem, state))
    missing.append(list(not_found(problem, state)))
    given, best = (
        [[round(each[name], 4) for name in names] for each in kind]
        for kind in zip(*curve, strict=True)
    )
    return {"names": names, "given": given, "best": best, "missing": missing}


def scores(problem: Problem, state: RunState) -> tuple[dict[str, float], dict[str, float]]:
    """IoU of every concept, in the given order and by the better assignment; mean over pictures."""
    given, best = [], []
    for prepared, picture in zip(problem.pictures, state.pictures, strict=True):
        masks, names = picture.labels, prepared.names
        of_truth = [iou(masks, prepared.truth[name].expand_as(masks)) for name in names]
        each = torch.stack(of_truth).double()
        given.append(by_name(names, each.diagonal()))
        best.append(by_name(names, each[range(len(names)), best_assignment(each)]))
    return mean_of(given), mean_of(best)


def read_once(problem: Problem, state: RunState) -> RunState:
    """One E-step with as many passes as an EM run reads, which takes all masks the guards believe."""
    settings = problem.settings
    masks = replace(settings.masks, acceptance=0.0)
    once = replace(settings, refresh=em_passes(settings), masks=masks)
    return e_step(replace(problem, settings=once), state)


def em_passes(settings: EMSettings) -> int:
    """Attention maps that an EM run reads: the start's, the refreshes', and the M-steps' in range."""
    low, high = settings.masks.timesteps
    rounds = settings.steps // settings.e_step_every
    own = round(settings.steps * settings.batch * (high - low)) if settings.free_statistics else 0
    return settings.masks.init_timesteps + rounds * settings.refresh + own


def said_missing(task: Task) -> Row:
    """What a run says, at its start, is not in the picture, or may not be what was found."""
    _, scene, _, arm = task
    problem = problem_of([absent_name(arm, scene)], settings_of("em"), task)
    names = [concept.name for concept in problem.concepts]
    state = start(problem)
    missing = names if state is None else list(not_found(problem, state))
    doubtful = [] if state is None else list(not_seen(problem, state))
    set_ = ABSENT_SETS[scene % len(ABSENT_SETS)]
    return {"set": set_, "names": names, "missing": missing, "doubtful": doubtful}


def discovered(task: Task) -> Row:
    """How many things are found without a word, and their IoU by the better assignment.

    A thing that is not found counts 0; one that is found and is not there shows in the count alone.
    """
    _, scene, seed, _ = task
    number, place = divmod(scene, len(DISCOVER_SETS))
    scene_of = concept_scene(FIRST_SCENE + number, DISCOVER_SETS[place]).only
    truth = torch.from_numpy(render(scene_of.objects, np.zeros((64, 64, 3), np.float32))[1])
    try:
        masks = discover(demo_host(), example_of(scene_of).picture, seed=100 * scene + seed)[
            1
        ].masks
    except UserError:
        masks = truth[:0]
    each = (
        torch.stack([iou(truth, mask.expand_as(truth)) for mask in masks]).T if len(masks) else None
    )
    found = torch.zeros(len(truth))
    if each is not None:
        rows = best_assignment(each.T) if len(masks) <= len(truth) else best_assignment(each)
        pairs = zip(rows, range(len(masks))) if len(masks) <= len(truth) else enumerate(rows)  # noqa: B905
        for thing, mask in pairs:
            found[thing] = each[thing, mask]
    best = [[round(value, 4) for value in found.tolist()]]
    return {"set": DISCOVER_SETS[place], "things": len(truth), "count": len(masks), "best": best}


@dataclass(frozen=True)
class Case:
    """What is run on a scene.

    Attributes:
        measure: gives the row of a run.
        arms: number of seeds of each arm.
        parts: scenes of this case to each scene of the others.
    """

    measure: Callable[[Task], Row]
    arms: Mapping[str, int] = field(default_factory=lambda: ARMS)
    parts: int = 1


CASES: dict[str, Case] = {
    **{set_: Case(partial(learned, partial(of_set, set_))) for set_ in SETS},
    "one": Case(partial(learned, one_name)),
    "discover": Case(discovered, {"discover": 1}, parts=len(DISCOVER_SETS)),
    "absent": Case(said_missing, {"alone": 2, "added": 2, "present": 2}, parts=len(ABSENT_SETS)),
}


def one(task: Task) -> Row:
    """The row of one run."""
    case, scene, seed, arm = task
    demo_host()
    began = time.perf_counter()
    row = CASES[case].measure(task)
    seconds = round(time.perf_counter() - began, 1)
    return {"case": case, "scene": scene, "seed": seed, "arm": arm, **row, "seconds": seconds}


def tasks(scenes: int, cases: Sequence[str], arms: Sequence[str] | None) -> Iterator[Task]:
    """All runs: scene by scene, the first seeds before the second, an arm in all cases at once."""
    known = list(dict.fromkeys(arm for case in cases for arm in CASES[case].arms))
    for scene in range(scenes):
        for seed in range(max(max(CASES[case].arms.values()) for case in cases)):
            for arm in arms or known:
                for name in cases:
                    case = CASES[name]
                    if seed < case.arms.get(arm, 0):
                        own = range(scene * case.parts, (scene + 1) * case.parts)
                        yield from ((name, number, seed, arm) for number in own)


def read_rows(path: Path) -> list[Row]:
    """The runs so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--runs", type=Path, default=RESULTS / "em_runs.jsonl")
    args = parser.parse_args()
    done = {(r["case"], r["scene"], r["seed"], r["arm"]) for r in read_rows(args.runs)}
    todo = [task for task in tasks(args.scenes, args.cases, args.arms) if task not in done]
    with (
        multiprocessing.get_context("spawn").Pool(args.workers) as pool,
        args.runs.open("a") as file,
    ):
        for i, row in enumerate(pool.imap_unordered(one, todo), start=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = row["given"][-1] if "given" in row else row.get("missing", row.get("count"))
            which = [row[key] for key in ("case", "scene", "seed", "arm")]
            print(f"{i}/{len(todo)}", *which, said, row["seconds"], "s", file=sys.stderr)


if __name__ == "__main__":
    main()
