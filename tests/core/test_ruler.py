"""The ruler of pictures on renders whose truth is known, and its judgements against ones made by hand."""

from itertools import permutations

import numpy as np
import pytest
import torch
from pictures_score import Wanted, judge
from ruler import BACKGROUNDS, PATTERNS, WORDS, Reading, Thing, read

from em_core.demo import textures
from em_core.demo.captions import Look
from em_core.demo.placing import place
from em_core.demo.rendering import render
from em_core.demo.scenes import concept_scene

REX, DOLL = ("star", "red", "striped"), ("fish", "teal", "rings")
OTHER = ("mug", "white", "plain")


def rendered(looks: list[Look], ground: str, seed: int) -> torch.Tensor:
    """A picture of things with these looks, values 0 to 1."""
    rng = np.random.default_rng([3, 12345, seed])
    objects = place(looks, rng, (11.0, 15.0) if len(looks) < 3 else (8.5, 10.5))
    picture, _ = render(objects, textures.background(ground, rng))
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def test_renders_are_read_rightly() -> None:
    """Sets A, B and C: at least 95 in 100 shapes, colours and patterns, and 95 in 100 counts."""
    scenes = [concept_scene(7000 + seed, set_) for set_ in "ABC" for seed in range(12)]
    pictures = torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) / 255 for s in scenes])
    right, counts, grounds = [], [], []
    for scene, reading in zip(scenes, read(pictures), strict=True):
        counts.append(len(reading.things) == 2)
        grounds.append(reading.background == scene.background)
        looks = [(each.shape, each.colour, each.pattern) for each in scene.objects]
        seen = [thing.look for thing in sorted(reading.things, key=lambda t: t.x)]
        if counts[-1]:
            right += [a == b for s, look in zip(seen, looks, strict=True) for a, b in zip(s, look)]  # noqa: B905
    assert np.mean(right) >= 0.95 and np.mean(counts) >= 0.9 and np.mean(grounds) >= 0.95


@pytest.mark.parametrize("seed", range(3))
def test_judgements_of_renders(seed: int) -> None:
    """What is rendered is what is asked for, or not: the judgement says which."""
    wanted = Wanted((REX, DOLL), "grass")
    cases = {
        "right": ([REX, DOLL], "grass"),
        "one is missing": ([REX], "grass"),
        "one too many": ([REX, DOLL, OTHER], "grass"),
        "colours exchanged": ([(*REX[:1], "teal", REX[2]), (DOLL[0], "red", DOLL[2])], "grass"),
        "elsewhere": ([REX, DOLL], "brick"),
    }
    pictures = torch.stack([rendered(looks, ground, seed) for looks, ground in cases.values()])
    judged = dict(zip(cases, (judge(r, wanted) for r in read(pictures)), strict=True))
    whole = judged["right"]
    assert whole["all_once"] == 1 and whole["background"] == 1 and whole["score"] > 0.85
    assert not whole["mixing"] and not whole["extra"]
    assert judged["one is missing"]["once"] == 0.5 and judged["one is missing"]["score"] < 0.55
    assert judged["one too many"]["extra"] == 1 and judged["one too many"]["once"] == 1
    assert judged["one too many"]["all_once"] == 0
    assert judged["colours exchanged"]["mixing"] == 1 and judged["colours exchanged"]["colour"] == 0
    assert judged["elsewhere"]["background"] == 0 and judged["elsewhere"]["all_once"] == 1


# Judgements of readings that are sure of what they say


def sure(look: Look) -> Thing:
    """A thing that certainly looks so."""
    one_hot = [
        torch.nn.functional.one_hot(torch.tensor(words.index(word)), len(words)).float()
        for words, word in zip(WORDS, look, strict=True)
    ]
    return Thing(32.0, 32.0, 1.0, (one_hot[0], one_hot[1], one_hot[2]))


def reading(looks: list[Look], ground: str = "sand") -> Reading:
    grounds = torch.nn.functional.one_hot(torch.tensor(BACKGROUNDS.index(ground)), 8).float()
    return Reading(tuple(map(sure, looks)), grounds)


@pytest.mark.parametrize("order", list(permutations(range(2))))
def test_the_order_of_things_does_not_matter(order: tuple[int, ...]) -> None:
    things = [[REX, DOLL][i] for i in order]
    judged = judge(reading(things), Wanted((REX, DOLL), "sand"))
    good = {k for k, v in judged.items() if v == 1}
    assert good == set(judged) - {"mixing", "extra", "same_place", "same_ground"}


def test_nothing_is_worth_nothing() -> None:
    judged = judge(reading([], "grass"), Wanted((REX, DOLL), "sand"))
    assert not any(judged.values())


def test_scores_by_hand() -> None:
    """Rex's pattern is wrong, and is no other's; a third thing is extra: (2/3 + 1) / 3."""
    wrong = next(p for p in PATTERNS if p not in (REX[2], DOLL[2]))
    judged = judge(reading([(*REX[:2], wrong), DOLL, OTHER]), Wanted((REX, DOLL), "sand"))
    assert judged["score"] == pytest.approx((2 / 3 + 1) / 3)
    assert judged["pattern"] == 0.5 and judged["shape"] == 1 and judged["extra"] == 1
    assert judged["mixing"] == 0 and judged["once"] == 1 and judged["all_once"] == 0


def test_copying_is_told_from_obeying() -> None:
    """Readings stand in the middle of the picture, on sand."""
    there, elsewhere = {REX: (34.0, 30.0)}, {REX: (34.0, 50.0)}
    asked = {ground: Wanted((REX, DOLL), ground, there, "sand") for ground in ("sand", "grass")}
    judged = {ground: judge(reading([DOLL, REX]), wanted) for ground, wanted in asked.items()}
    assert judged["sand"]["same_place"] == judged["grass"]["same_place"] == 1
    assert judged["sand"]["same_ground"] == 0 and judged["grass"]["same_ground"] == 1
    assert judge(reading([REX]), Wanted((REX,), "sand", elsewhere, "sand"))["same_place"] == 0
    assert judge(reading([DOLL]), Wanted((DOLL,), "sand", there, "sand"))["same_place"] == 0


def test_two_of_a_kind_do_not_mix_by_being_themselves() -> None:
    twins = (REX, ("star", "teal", "rings"))
    assert judge(reading(list(twins)), Wanted(twins, "sand"))["mixing"] == 0
    mixed = [REX, ("star", "red", "rings")]
    assert judge(reading(mixed), Wanted(twins, "sand"))["mixing"] == 1


def test_a_concept_drawn_twice_is_not_there_once() -> None:
    judged = judge(reading([REX, REX, DOLL]), Wanted((REX, DOLL), "sand"))
    assert judged["once"] == 0.5 and judged["extra"] == 1
