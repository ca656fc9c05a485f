"""Settings, concept sets and their files."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equality import differences

from em_core.errors import UserError
from em_core.masks.crf import CRFSettings
from em_core.masks.guards import Guards
from em_core.masks.settings import MaskSettings
from em_core.model.identity import ModelIdentity
from em_core.presets import em_settings, joint_settings, literal
from em_core.prompts import Concept
from em_core.runs.concept_set import ConceptSet
from em_core.settings import EMSettings, JointSettings, from_json, to_json

IDENTITY = ModelIdentity("sd1", "abc", {"clip_l": 4}, torch.arange(1.0, 9.0))


def concept_set() -> ConceptSet:
    return ConceptSet(
        concepts=(Concept("rex", "old dog"), Concept("doll")),
        vectors={"rex": {"clip_l": torch.randn(2, 4)}, "doll": {"clip_l": torch.randn(1, 4)}},
        identity=IDENTITY,
        weights={"unet.a.lora_down": torch.randn(2, 3)},
        lora_scale=0.25,
        prompts=("a <rex:old dog> and <doll>", "<doll>"),
        masks=(
            {"rex": torch.rand(4, 4) > 0.5, "doll": torch.rand(4, 4) > 0.5},
            {"doll": torch.rand(2, 6) > 0.5},
        ),
        settings={"em": to_json(EMSettings())},
        curves={"loss/total": ((1, 0.5), (2, 0.25))},
    )


@pytest.mark.parametrize(
    "settings",
    [
        EMSettings(),
        literal(em_settings("sd-64")),
        EMSettings(mode="fixed", masks=MaskSettings(threshold="otsu", crf=None)),
        EMSettings(masks=MaskSettings(crf=CRFSettings(working_size=256))),
    ],
)
def test_settings_survive_json(settings: EMSettings) -> None:
    assert from_json(EMSettings, json.loads(json.dumps(to_json(settings)))) == settings


def test_absent_values_keep_their_defaults() -> None:
    read = from_json(EMSettings, {"steps": 7, "masks": {"guards": {"max_area": 0.5}}})
    expected = MaskSettings(guards=Guards(max_area=0.5))
    assert read == EMSettings(steps=7, masks=expected)


def test_joint_settings_survive_json() -> None:
    joint = JointSettings(kind="full", token_learning_rate=None)
    assert from_json(JointSettings, json.loads(json.dumps(to_json(joint)))) == joint


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "Bad steps. Expected at least 1, got 0"),
        ({"vectors": 0}, "Bad vectors"),
        ({"e_step_every": 0}, "Bad e_step_every"),
        ({"learning_rate": float("inf")}, "Bad learning rate"),
        ({"attention_weight": -0.1}, "Bad attention_weight"),
        ({"gradient_clip": 0.0}, "Bad gradient_clip"),
        ({"image_side": 0}, "Bad side of pictures"),
        ({"decay_after": 0}, "Bad decay_after. Expected at least 1, or None, got 0"),
    ],
)
def test_settings_out_of_range(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        EMSettings(**change)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        (MaskSettings, {"init_timesteps": 0}, "Bad number of passes. Expected at least 1, got 0"),
        (MaskSettings, {"timesteps": (0.5, 0.5)}, "Bad range of timesteps"),
        (MaskSettings, {"threshold": 1.5}, "Bad threshold"),
        (JointSettings, {"learning_rate": 0.0}, "Bad learning_rate of the joint phase"),
        (JointSettings, {"token_learning_rate": float("nan")}, "Bad token_learning_rate"),
        (JointSettings, {"prior_weight": -1.0}, "Bad prior_weight"),
        (JointSettings, {"decay_after": 0}, "Bad decay_after"),
        (JointSettings, {"seg_mix": 1.5}, "Bad seg_mix. Expected a share, 0 to 1, got 1.5"),
        (JointSettings, {"seg_mix_pictures": 0}, "Bad seg_mix_pictures"),
        (JointSettings, {"surroundings_weight": -1.0}, "Bad surroundings_weight"),
    ],
)
def test_other_settings_out_of_range(kind: type, change: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        kind(**change)


def test_whole_weights_learn_slower_than_a_lora() -> None:
    """Break-a-Scene's and Mix-of-Show's rates, unless one is given."""
    rates = [JointSettings(kind).weights_rate for kind in ("lora", "cross_attention", "full")]
    assert rates == [1e-4, 2e-6, 2e-6]
    assert JointSettings("full", learning_rate=1e-3).weights_rate == 1e-3
    assert joint_settings("sdxl", "full").weights_rate == 2e-6


def test_a_concept_file_holds_everything(tmp_path: Path) -> None:
    """Every field, also one that is added later; the settings as the JSON values that they are."""
    ours = concept_set()
    ours.save(tmp_path / "c.safetensors")
    theirs = ConceptSet.load(tmp_path / "c.safetensors")
    as_json = json.loads(json.dumps(ours.settings))
    assert not differences(theirs, replace(ours, settings=as_json))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_concepts_fit_their_own_model_in_any_number_type(dtype: torch.dtype) -> None:
    sample = torch.randn(300, generator=torch.Generator().manual_seed(0))
    rounded = sample.to(dtype).float()
    assert not torch.equal(rounded, sample)
    ours = replace(concept_set(), identity=replace(IDENTITY, sample=sample))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.require_fit(replace(IDENTITY, sample=rounded))


def test_another_architecture_never_fits() -> None:
    for other in (replace(IDENTITY, architecture="x"), replace(IDENTITY, encoders={"clip_l": 8})):
        with pytest.raises(UserError, match="different architecture"):
            concept_set().require_fit(other, any_weights=True)


def test_a_fine_tune_fits_on_request() -> None:
    tuned = replace(IDENTITY, sample=IDENTITY.sample * 1.1)
    with pytest.raises(UserError, match="learned on a different model"):
        concept_set().require_fit(tuned)
    with pytest.warns(UserWarning, match="less faithfully"):
        concept_set().require_fit(tuned, any_weights=True)
