"""Are the concepts really learned, and do better masks give better concepts? Pictures, read by a ruler.

    python benchmarks/pictures.py

For each scene of two held-out concepts, each arm learns them from the one picture; then each concept alone,
both together, both on another background, one with a known thing, and both in the other order are drawn,
with the same seeds for all arms, and read by ruler.py. A row has the judgement of every picture; see
pictures_score.py. Rows are appended to results/pictures_runs.jsonl and never repeated, scene by scene, the
main arms of a scene before the next scene. pictures_table.py makes the table, also before all are there,
pictures_sheet.py the sheets, from the drawings that are kept in --drawings.

Scenes 2000 and up are for this benchmark alone; methods are tuned on those below 150. `ceiling` draws known
things by their true captions, and `caption` the concepts of A, whose words the model knows, by theirs.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from em import read_once, read_rows
from jaxtyping import Float
from pictures_score import Spot, Wanted, judge
from ruler import read
from torch import Tensor

from em_core.commands.common import load_host
from em_core.commands.demo import GUIDANCE as DEMO_GUIDANCE
from em_core.commands.demo import OTHER_PLACES, example_of
from em_core.demo.captions import Look, full_caption
from em_core.demo.rendering import SIZE
from em_core.demo.scenes import ConceptPicture, combinations, concept_scene
from em_core.examples import Example
from em_core.files import write_text
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.loop import learn
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.pictures import read_picture, save_image, to_image
from em_core.presets import em_settings, joint_settings, vico, visual_settings
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import run
from em_core.runs.visual import learn_visual
from em_core.runs.visual_condition import VisualCondition
from em_core.settings import EMSettings, JointSettings, WeightKind

RESULTS = Path(__file__).parent / "results"
DRAWINGS = Path("output/pictures")
FIRST_SCENE, SETS = 2000, "ABC"
DRAWING_STEPS = 20
OWN = {"alone_0": 0, "alone_1": 1, "with_known": 0}
"""Prompts of one concept, and which one."""
Row = dict[str, Any]
NAMES = ("set", "scene", "seed", "arm")
Key = tuple[str, int, int, str]
Prompts = dict[str, tuple[str, Wanted]]


@dataclass(frozen=True)
class Arm:
    """What is learned, and how it is drawn.

    Attributes:
        changes: of the settings of the EM loop.
        joint: kind of the joint phase, and `joint_changes` of its settings.
        guidance: scale of classifier-free guidance.
        learned: False draws captions that the model knows, and learns nothing.
        once: the tokens are learned under the first masks for half of the steps, then under masks read once.
        visual: a visual condition comes with it: "ours", or "vico", which learns as published and has no
            EM loop and knows one concept at a time; `visual_changes` of its settings, and `strength` at
            which it is drawn.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    joint: WeightKind = "none"
    joint_changes: Mapping[str, Any] = field(default_factory=dict)
    guidance: float = DEMO_GUIDANCE
    learned: bool = True
    once: bool = False
    visual: Literal["", "ours", "vico"] = ""
    visual_changes: Mapping[str, Any] = field(default_factory=dict)
    strength: float = 1.0


MASKS: dict[str, Arm] = {
    "em": Arm(),
    "none": Arm({"mode": "none"}),
    "given": Arm({"mode": "given"}),
    "fixed": Arm({"mode": "fixed"}),
    "read_once": Arm({"mode": "fixed"}, once=True),
}
JOINT: dict[str, WeightKind] = {"": "none", "+lora": "lora", "+full": "full"}
MAIN: dict[str, Arm] = {
    mask + more: replace(plain, joint=kind)
    for mask, plain in MASKS.items()
    for more, kind in JOINT.items()
} | {"ceiling": Arm(learned=False), "caption": Arm(learned=False)}
VISUAL: dict[str, Arm] = {
    "visual": Arm(visual="ours"),
    "visual+lora": Arm(joint="lora", visual="ours"),
    "vico": Arm(visual="vico"),
    "visual_400": Arm(visual="ours", visual_changes={"steps": 400}),
    "visual_tokens_too": Arm(visual="ours", visual_changes={"token_learning_rate": 1e-3}),
    "visual_not_disturbed": Arm(visual="ours", visual_changes={"disturb": False}),
    "visual_noise": Arm(visual="ours", visual_changes={"reference_noise": 0.05}),
    "visual_half": Arm(visual="ours", strength=0.5),
}
OTHERS: dict[str, Arm] = {
    **{f"steps_{steps}": Arm({"steps": steps}) for steps in (60, 240, 400, 800)},
    **{
        f"steps_400_no_decay{more}": Arm({"steps": 400, "decay_after": None}, joint=kind)
        for more, kind in JOINT.items()
    },
    "decay_60": Arm({"decay_after": 60}),
    "steps_400_decay_60": Arm({"steps": 400, "decay_after": 60}),
    "vectors_2": Arm({"vectors": 2}),
    "vectors_4": Arm({"vectors": 4}),
    "no_union": Arm({"union_sampling": False}),
    "no_crf": Arm({"masks.crf": None}),
    "no_attention_loss": Arm({"attention_weight": 0.0}),
    "no_masked_loss": Arm({"masked_loss": False}),
    "lora_50": Arm(joint="lora", joint_changes={"steps": 50}),
    "lora_400": Arm(joint="lora", joint_changes={"steps": 400}),
    "lora_400_no_decay": Arm(joint="lora", joint_changes={"steps": 400, "decay_after": None}),
    "lora_alpha_4": Arm(joint="lora", joint_changes={"alpha": 4.0}),
    "lora_alpha_4_200": Arm(
        joint="lora", joint_changes={"alpha": 4.0, "steps": 200, "decay_after": 200}
    ),
    "lora_prior": Arm(joint="lora", joint_changes={"prior_weight": 1.0}),
    "lora_seg_mix": Arm(joint="lora", joint_changes={"seg_mix": 0.3}),
    "lora_seg_mix_prior": Arm(joint="lora", joint_changes={"seg_mix": 0.3, "prior_weight": 1.0}),
    "cross_attention": Arm(joint="cross_attention"),
    "full_no_surroundings": Arm(joint="full", joint_changes={"surroundings_weight": 0.0}),
    "full_seg_mix": Arm(joint="full", joint_changes={"seg_mix": 0.3}),
    **{f"guidance_{scale}": Arm(guidance=scale) for scale in (2.0, 5.0, 7.5)},
    **{f"lora_guidance_{s}": Arm(joint="lora", guidance=s) for s in (2.0, 5.0, 7.5)},
}
ARMS = MAIN | VISUAL | OTHERS


@lru_cache
def demo_host() -> DiffusersHost:
    """The demo model, loaded once."""
    torch.set_num_threads(1)
    return load_host("demo")


def settings_of(arm: Arm, seed: int) -> tuple[EMSettings, JointSettings]:
    """The settings of both phases of an arm; a change of `masks.name` is one of the mask settings'."""
    family = demo_host().identity().family
    settings = replace(em_settings(family), seed=seed)
    for name, value in arm.changes.items():
        if name.startswith("masks."):
            value = replace(settings.masks, **{name.removeprefix("masks."): value})
            name = "masks"
        settings = replace(settings, **{name: value})
    return settings, replace(joint_settings(family, arm.joint), **arm.joint_changes)


@lru_cache(maxsize=1)
def loop_of(set_: str, scene: int, seed: int, changes: str, once: bool) -> tuple[Problem, RunState]:
    """The EM loop of a scene, which arms with and without a joint phase have in common."""
    settings, _ = settings_of(Arm(json.loads(changes)), 100 * scene + seed)
    picture = concept_scene(scene, set_).only
    problem = prepare(demo_host(), [example_with_masks(picture)], settings)
    state = initialise(problem)
    if once:
        steps = learn(problem, state)
        state = next(after for event, after in steps if 2 * event.step >= event.steps)
        state = read_once(problem, state)
    return problem, run(problem, state)


def example_with_masks(picture: ConceptPicture) -> Example:
    """A picture with its true masks, which mode `given` alone learns under."""
    example = example_of(picture)
    return replace(example, masks=dict(example.truth))


def concepts_of(key: Key, arm: Arm) -> ConceptSet:
    """What an arm learns from a scene."""
    set_, scene, seed, _ = key
    problem, state = loop_of(set_, scene, seed, json.dumps(dict(arm.changes)), arm.once)
    if arm.joint != "none":
        problem = replace(problem, joint=settings_of(arm, seed)[1])
        state = run(problem, state)
    return conclude(problem, state)


def conditions_of(
    key: Key, arm: Arm, concepts: ConceptSet | None
) -> list[VisualCondition] | list[None]:
    """The visual condition that an arm learns from its concepts; ViCo's are of one concept each."""
    if not arm.visual:
        return [None]
    set_, scene, seed, _ = key
    example = example_with_masks(concept_scene(scene, set_).only)
    settings, _ = settings_of(arm, 100 * scene + seed)
    visual = replace(visual_settings(demo_host().identity().family), **arm.visual_changes)
    if arm.visual == "ours":
        return [learn_visual(demo_host(), [example], settings, visual, concepts)]
    ground = concept_scene(scene, set_).only.background
    published = vico(settings, visual)
    return [
        learn_visual(demo_host(), [replace(example, prompt=alone, masks={})], *published)
        for concept in example.prompt.concepts
        for alone in [ConceptPrompt.parse(f"a photo of {concept} on {ground}")]
    ]


def prompts_of(
    picture: ConceptPicture,
    phrases: Sequence[str],
    looks: Sequence[Look],
    places: Mapping[Look, Spot],
    rng: np.random.Generator,
) -> Prompts:
    """What is drawn of a scene's things, which `phrases` call in prompts: kind -> prompt, what it asks for.

    The known thing is one that the demo model was trained on and that shares nothing with the first.
    `places` says where the picture has the things, if it is them.
    """
    here = picture.background
    elsewhere = next(place for place in OTHER_PLACES if place != here)
    strangers = [look for look in combinations(False) if not set(look) & set(looks[0])]
    known = strangers[int(rng.integers(len(strangers)))]
    asked: dict[str, tuple[Sequence[str], Sequence[Look], str]] = {
        f"alone_{index}": ([phrase], [look], here)
        for index, (phrase, look) in enumerate(zip(phrases, looks, strict=True))
    }
    asked |= {
        "together": (phrases, looks, here),
        "elsewhere": (phrases, looks, elsewhere),
        "with_known": ([phrases[0], phrase_of(known)], [looks[0], known], here),
        "other_order": (phrases[::-1], looks[::-1], here),
    }
    return {
        kind: (
            f"a photo of {' and '.join(words)} on {ground}",
            Wanted(tuple(of), ground, places, here if places else ""),
        )
        for kind, (words, of, ground) in asked.items()
    }


def phrase_of(look: Look) -> str:
    """A thing's full description with its article."""
    return full_caption([look], "").text.removeprefix("a photo of ").removesuffix(" on ")


def asked_of(key: Key) -> Prompts:
    """The prompts of an arm, and what each asks for."""
    set_, scene, _, arm = key
    picture = concept_scene(scene, set_).only
    rng = np.random.default_rng(scene)
    found = [picture.objects[i] for i in picture.meant.values() if i is not None]
    looks = [(each.shape, each.colour, each.pattern) for each in found]
    places = {look: (each.x, each.y) for look, each in zip(looks, found, strict=True)}
    names = [f"<{name}>" for name in picture.meant]
    if arm == "ceiling":
        known = combinations(False)
        looks = [known[int(index)] for index in rng.choice(len(known), len(looks), replace=False)]
    if not ARMS[arm].learned:
        names, places = [phrase_of(look) for look in looks], {}
    prompts = prompts_of(picture, names, looks, places, rng)
    return {kind: prompts[kind] for kind in OWN} if ARMS[arm].visual == "vico" else prompts


def drawn(
    key: Key, drawings: int
) -> tuple[dict[str, Float[Tensor, "b 3 64 64"]], dict[str, float]]:
    """An arm's pictures of each kind, and what learning took and gave."""
    arm, began = ARMS[key[3]], time.perf_counter()
    concepts = concepts_of(key, arm) if arm.learned and arm.visual != "vico" else None
    conditions = conditions_of(key, arm, concepts)
    told = {"seconds": round(time.perf_counter() - began, 1)}
    if concepts is not None:
        ious = [
            points[-1][1] for name, points in concepts.curves.items() if name.startswith("iou/")
        ]
        told |= {"iou": round(float(np.mean(ious)), 4)} if ious else {}
    seeds = [100 * key[1] + index for index in range(drawings)]
    # Half the time, and no difference to be seen: .004 in the mean of values 0 to 1.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pictures = {
            kind: demo_host().generate(
                prompt,
                concepts,
                seeds,
                DRAWING_STEPS,
                arm.guidance,
                condition=conditions[OWN.get(kind, 0) % len(conditions)],
                strength=arm.strength,
            )
            for kind, (prompt, _) in asked_of(key).items()
        }
    return pictures, told


def one(key: Key, drawings: int, folder: Path) -> Row:
    """The row of an arm on a scene; its pictures are kept in the folder."""
    pictures, told = drawn(key, drawings)
    rows = [torch.cat(list(of_kind), dim=2) for of_kind in pictures.values()]
    path = strip(key, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(path, to_image(torch.cat(rows, dim=1)))
    return {**dict(zip(NAMES, key, strict=True)), **told, **judged(key, folder)}


def strip(key: Key, folder: Path) -> Path:
    """Where the pictures of a run are: a row of each kind of prompt."""
    set_, scene, seed, arm = key
    return folder / f"{arm}_{set_}{scene}_{seed}.png"


def judged(key: Key, folder: Path) -> Row:
    """The judgements of a run's pictures, as they were kept."""
    pictures = read_picture(strip(key, folder)).unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
    found = {}
    for (kind, (_, wanted)), of_kind in zip(asked_of(key).items(), pictures.unbind(1), strict=True):
        each = [judge(reading, wanted) for reading in read(of_kind.transpose(0, 1))]
        found[kind] = [{name: round(value, 3) for name, value in of.items()} for of in each]
    fields = list(next(iter(found.values()))[0])
    values = {kind: [list(of.values()) for of in each] for kind, each in found.items()}
    return {"fields": fields, "pictures": values}


def read_again(path: Path, folder: Path) -> None:
    """Judge all pictures that were kept once more, as after a change of the ruler."""
    rows = [
        row | judged((row["set"], row["scene"], row["seed"], row["arm"]), folder)
        for row in read_rows(path)
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def keys(scenes: Sequence[int], sets: str, arms: Sequence[str], seeds: int) -> Iterator[Key]:
    """All rows: the arms of a scene before the next scene, the first seeds before the second."""
    for seed in range(seeds):
        for scene in scenes:
            for set_ in sets:
                for arm in arms:
                    if arm != "caption" or set_ == "A":
                        yield set_, scene, seed, arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=8, help="of each set")
    parser.add_argument("--first", type=int, default=FIRST_SCENE, help="seed of the first scene")
    parser.add_argument(
        "--sets", default=SETS, help="sets of the demo world (default: %(default)s)"
    )
    parser.add_argument("--arms", nargs="+", default=list(MAIN), choices=ARMS, metavar="ARM")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--drawings", type=int, default=4, help="of each prompt")
    parser.add_argument("--folder", type=Path, default=DRAWINGS, help="where drawings are kept")
    parser.add_argument("--runs", type=Path, default=RESULTS / "pictures_runs.jsonl")
    parser.add_argument("--read-again", action="store_true", help="only judge the drawings again")
    args = parser.parse_args()
    if args.read_again:
        read_again(args.runs, args.folder)
        return
    done = {tuple(row[name] for name in NAMES) for row in read_rows(args.runs)}
    scenes = range(args.first, args.first + args.scenes)
    wanted = keys(scenes, args.sets, args.arms, args.seeds)
    todo = [key for key in wanted if key not in done]
    with args.runs.open("a") as file:
        for count, key in enumerate(todo, start=1):
            began = time.perf_counter()
            file.write(json.dumps(one(key, args.drawings, args.folder)) + "\n")
            file.flush()
            took = time.perf_counter() - began
            print(f"{count}/{len(todo)}", *key, f"{took:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
