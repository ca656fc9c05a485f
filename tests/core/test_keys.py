"""A run's key: all that acts is in it, and nothing else; true masks are only compared with."""

import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from whole_runs import JOINT

from em_core import (
    DiffusersHost,
    EMSettings,
    Example,
    JointSettings,
    RunStore,
    learn_concepts,
)
from em_core.errors import StoreWarning
from em_core.method.state import RunState
from em_core.model.schedules import VariancePreserving
from em_core.prompts import ConceptPrompt
from em_core.runs import key
from em_core.runs.key import model_digest, pack_digest, run_key
from em_core.runs.truth import without_iou

PROMPT = "a photo of <rex:star> and <doll:circle> on grass"


def prompted(example: Example, text: str) -> Example:
    return replace(example, prompt=ConceptPrompt.parse(text))


def test_the_key_depends_on_all_that_acts(example: Example, short: EMSettings) -> None:
    """Equal inputs give the same key, also after a copy; each change gives another."""
    names = list(example.truth)
    given = replace(short, mode="given")
    masked = replace(example, masks=dict(example.truth))
    swapped = dict(zip(names, reversed(example.truth.values()), strict=True))
    one, pixel = example.picture.clone(), {n: m.clone() for n, m in example.truth.items()}
    one[0, 0, 0] += 1e-6
    pixel[names[0]][13, 57] ^= True
    runs: list[tuple[str, list[Example], EMSettings, JointSettings]] = [
        ("model", [example], short, JOINT),
        ("other model", [example], short, JOINT),
        ("model", [example, example], short, JOINT),
        ("model", [replace(example, picture=example.picture * 0.999)], short, JOINT),
        ("model", [replace(example, picture=one)], short, JOINT),
        ("model", [replace(example, picture=example.picture.transpose(1, 2))], short, JOINT),
        ("model", [prompted(example, "<rex> and <doll>")], short, JOINT),
        ("model", [prompted(example, "<doll> and <rex>")], short, JOINT),
        ("model", [prompted(example, "<rex:a> b and <doll>")], short, JOINT),
        ("model", [prompted(example, "<rex:a b> and <doll>")], short, JOINT),
        ("model", [masked], given, JOINT),
        ("model", [replace(example, masks=swapped)], given, JOINT),
        ("model", [replace(example, masks=pixel)], given, JOINT),
        ("model", [example], replace(short, seed=4), JOINT),
        ("model", [example], replace(short, masks=replace(short.masks, crf=None)), JOINT),
        ("model", [example], short, replace(JOINT, kind="lora")),
    ]
    keys = [run_key(*of) for of in runs]
    assert len(set(keys)) == len(runs)
    copied = replace(example, picture=example.picture.clone())
    assert run_key("model", [copied], replace(short), replace(JOINT)) == keys[0]


@pytest.mark.parametrize("text", ["a  photo of\n<rex:star> and <doll:circle>\ton grass ",
                                  "a photo of<rex: star >and<doll:circle>on grass"])  # fmt: skip
def test_white_space_does_not_act(example: Example, short: EMSettings, text: str) -> None:
    spaced, tidy = prompted(example, text), prompted(example, PROMPT)
    assert run_key("m", [spaced], short, JOINT) == run_key("m", [tidy], short, JOINT)


def test_masks_that_are_only_compared_with_do_not_act(example: Example, short: EMSettings) -> None:
    """The user's masks act in mode "given", true masks in none."""
    bare = replace(example, masks={}, truth={})
    keys = {
        run_key("m", [replace(bare, masks=m, truth=t)], short, JOINT)
        for m in ({}, example.truth)
        for t in ({}, example.truth)
    }
    assert len(keys) == 1
    given = replace(short, mode="given")
    masked = replace(bare, masks=example.truth)
    assert run_key("m", [masked], given, JOINT) != run_key("m", [bare], given, JOINT)
    assert run_key("m", [masked], given, JOINT) == run_key(
        "m", [replace(masked, truth=example.truth)], given, JOINT
    )


def test_the_digest_of_a_model_depends_on_all_of_it(host: DiffusersHost) -> None:
    """What it predicts, its schedule, and any weight, wherever the change is."""
    same, before = copy(host), model_digest(host)
    assert model_digest(same) == before
    alphas = host.schedule.alphas_cumprod  # type: ignore[attr-defined]
    same.schedule = VariancePreserving(alphas, "v_prediction")
    other = copy(host)
    other.schedule = VariancePreserving(alphas * 0.999, "epsilon")
    digests = {before, model_digest(same), model_digest(other)}
    assert len(digests) == 3
    for module in (host.unet, host.vae, host.pipeline.text_encoder):
        weight = next(module.parameters()).data.view(-1)
        kept = weight[0].clone()
        try:
            weight[0] += 1e-3
            digests.add(model_digest(host))
        finally:
            weight[0] = kept
    assert len(digests) == 6 and model_digest(host) == before


def test_the_packs_sources_are_part_of_the_key(
    example: Example, short: EMSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that runs depend on; a changed command or picture of results lets runs be found again."""
    core = tmp_path / "pack" / "em_core"
    kept = ("*.safetensors", "*.png", "__pycache__", "*.jsonl")
    shutil.copytree(key.CORE, core, ignore=shutil.ignore_patterns(*kept))
    shutil.copytree(key.CORE.parent / "nodes", core.parent / "nodes")
    (core.parent / "pyproject.toml").write_text("")
    monkeypatch.setattr(key, "CORE", core)

    def now() -> str:
        pack_digest.cache_clear()
        return run_key("m", [example], short, JOINT)

    before = now()
    for part in ("em_core/show/plots.py", "em_core/commands/learn.py", "nodes/learn.py"):
        with (core.parent / part).open("a") as file:
            file.write("# changed\n")
    assert now() == before
    seen = {before}
    acting = ("em_core/method/losses.py", "em_core/masks/crf/filtering.py", "em_core/prompts.py",
              "nodes/host/comfy_host.py", "nodes/learning/flow.py")  # fmt: skip
    for part in acting:
        with (core.parent / part).open("a") as file:
            file.write("# changed\n")
        seen.add(now())
    assert len(seen) == 1 + len(acting)
    pack_digest.cache_clear()


class Secret:
    """A schedule that holds what nobody can read."""

    def __init__(self, schedule: VariancePreserving) -> None:
        self.file = open(__file__)  # noqa: SIM115
        self.schedule = schedule

    def __getattr__(self, name: str) -> object:
        return getattr(self.schedule, name)


def test_a_model_that_cannot_be_read_is_learned_on_without_the_store(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    secret = Secret(host.schedule)  # type: ignore[arg-type]
    monkeypatch.setattr(host, "schedule", secret)
    with pytest.warns(StoreWarning, match="holds an object of the kind _io.TextIOWrapper"):
        found = learn_concepts(host, [example], brief, store=RunStore(tmp_path))
    secret.file.close()
    assert found.names and not list(tmp_path.iterdir())


# True masks


@pytest.fixture
def brief(short: EMSettings) -> EMSettings:
    masks = replace(short.masks, init_timesteps=6)
    return replace(short, steps=6, e_step_every=3, masks=masks)


def iou_of(curves: dict) -> dict:
    return {name: points for name, points in curves.items() if name.startswith("iou/")}


def test_a_run_that_is_found_is_compared_with_the_true_masks_at_hand(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    """Whatever it saw before: the oracle is the run that saw them, at its last masks."""
    other = {name: ~mask for name, mask in example.truth.items()}
    shown = [replace(example, truth=truth) for truth in (example.truth, other, {})]
    expected = [learn_concepts(host, [one], brief).curves for one in shown]
    store = RunStore(tmp_path)
    learn_concepts(host, [shown[0]], brief, store=store)
    for one, curves in zip(shown, expected, strict=True):
        found = learn_concepts(host, [one], brief, store=store)
        assert without_iou(found.curves) == without_iou(curves)
        last = {name: points[-1] for name, points in iou_of(curves).items()}
        assert {name: points[-1] for name, points in iou_of(found.curves).items()} == last
    assert len(iou_of(expected[1])) == 2 and not iou_of(expected[2])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_that_goes_on_with_other_true_masks_has_no_iou_with_the_former(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    store = RunStore(tmp_path)

    def stop(event: object, state: RunState) -> None:
        if state.step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        learn_concepts(host, [example], brief, store=store, listeners=[stop])
    other = replace(example, truth={name: ~mask for name, mask in example.truth.items()})
    found = learn_concepts(host, [other], brief, store=store)
    whole = learn_concepts(host, [other], brief)
    assert without_iou(found.curves) == without_iou(whole.curves)
    late = {name: points[-1:] for name, points in iou_of(whole.curves).items()}
    assert iou_of(found.curves) == late and all(points[0][0] == 6 for points in late.values())
    assert torch.equal(*(c.vectors["rex"]["clip_l"] for c in (found, whole)))
