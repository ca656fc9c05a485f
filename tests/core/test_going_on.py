"""Learning that goes on from concepts that are there already, learned or imported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equality import differences
from safetensors.torch import save_file
from whole_runs import JOINT

from em_core import (
    ConceptSet,
    DiffusersHost,
    EMSettings,
    Example,
    PlannedModel,
    UserError,
    learn_concepts,
)
from em_core.__main__ import main
from em_core.demo import model_path
from em_core.exchange.importing import concept_of_embedding, unknown_model
from em_core.pictures import save_image, to_image
from em_core.runs.key import run_key
from em_core.settings import JointSettings


@pytest.fixture
def brief(short: EMSettings) -> EMSettings:
    """Two steps that move the vectors by next to nothing."""
    masks = replace(short.masks, init_timesteps=4, presence_passes=0)
    return replace(short, mode="fixed", steps=2, learning_rate=1e-7, masks=masks)


def start(host: DiffusersHost, example: Example, count: int = 3) -> ConceptSet:
    """Concepts of random vectors, as another program would have made them."""
    made = torch.Generator().manual_seed(0)
    widths = dict(host.identity().encoders)
    vectors = {
        c.name: {e: torch.randn(count, w, generator=made) * 0.02 for e, w in widths.items()}
        for c in example.prompt.concepts
    }
    return ConceptSet(example.prompt.concepts, vectors, unknown_model("sd-64", widths))


def test_starts_from_the_vectors(host: DiffusersHost, example: Example, brief: EMSettings) -> None:
    """Not from the prompt's words, and with as many vectors as they have; other concepts from their words."""
    first, second = example.prompt.names[:2]
    known = start(host, example)
    one = replace(known, concepts=known.concepts[:1], vectors={first: known.vectors[first]})
    learned = learn_concepts(host, [example], brief, concepts=one)
    fresh = learn_concepts(host, [example], brief)
    for encoder, before in known.vectors[first].items():
        assert torch.allclose(learned.vectors[first][encoder], before, atol=1e-5)
        assert torch.allclose(
            learned.vectors[second][encoder], fresh.vectors[second][encoder], atol=1e-5
        )
    assert learned.names == fresh.names


def test_with_a_memory_plan(host: DiffusersHost, example: Example, brief: EMSettings) -> None:
    known = start(host, example)
    planned = PlannedModel(model_path(), plan="float32")
    own = learn_concepts(host, [example], brief, concepts=known)
    found = planned.learn_concepts([example], brief, concepts=known)
    assert not differences(own.vectors, found.vectors)
    assert differences(own.vectors, planned.learn_concepts([example], brief).vectors)


def test_an_embedding_of_another_program(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    name = example.prompt.names[0]
    (width,) = dict(host.identity().encoders).values()
    save_file({"emb_params": torch.full((2, width), 0.01)}, tmp_path / "dog.safetensors")
    known = concept_of_embedding(tmp_path / "dog.safetensors", name)
    learned = learn_concepts(host, [example], brief, concepts=known)
    (vectors,) = learned.vectors[name].values()
    assert torch.allclose(vectors, torch.full((2, width), 0.01), atol=1e-5)


def test_a_lora_acts_and_is_kept(
    host: DiffusersHost, example: Example, brief: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = replace(JOINT, kind="lora", steps=1, learning_rate=1e-2)
    before = learn_concepts(host, [example], brief, lora)
    learned = learn_concepts(host, [example], brief, concepts=before)
    alone = learn_concepts(host, [example], brief, concepts=replace(before, weights={}))
    assert not differences(learned.weights, before.weights)
    assert learned.lora_scale == before.lora_scale
    assert learned.curves["loss/total"] != alone.curves["loss/total"]
    with pytest.raises(UserError, match="have weights of their own"):
        learn_concepts(host, [example], brief, lora, before)


def test_a_key_of_its_own(host: DiffusersHost, example: Example, brief: EMSettings) -> None:
    joint, known = JointSettings(), start(host, example)
    moved = {n: {e: v + 1e-3 for e, v in of.items()} for n, of in known.vectors.items()}
    keys = {
        run_key("m", [example], brief, joint, None, concepts)
        for concepts in (None, known, replace(known, vectors=moved))
    }
    assert len(keys) == 3


def test_by_the_commands(
    host: DiffusersHost, example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An embedding is imported, and learned on for a step; the tokens have moved from there a little."""
    name = example.prompt.names[0]
    (width,) = dict(host.identity().encoders).values()
    made = torch.full((2, width), 0.01)
    save_file({"emb_params": made}, tmp_path / "dog.safetensors")
    picture, out = tmp_path / "picture.png", tmp_path / "out"
    save_image(picture, to_image(example.picture))
    given = ["--file", str(tmp_path / "dog.safetensors"), "--name", name]
    begun = str(tmp_path / "begun.safetensors")
    assert main(["import", *given, "--out", begun]) == 0
    learn = ["learn", "--image", str(picture), "--prompt", f"a photo of <{name}>", "--steps", "1",
             "--mode", "none", "--quiet", "--concepts", begun, "--out", str(out)]  # fmt: skip
    assert main(learn) == 0
    (vectors,) = ConceptSet.load(out / "concepts.safetensors").vectors[name].values()
    assert vectors.shape == made.shape and 0 < (vectors - made).abs().max() < 0.05
    lora = replace(start(host, example), weights={"some.weight.diff": torch.ones(2)})
    lora.save(tmp_path / "lora.safetensors")
    capsys.readouterr()
    again = [*learn[:-3], str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "b")]
    assert main([*again, "--joint", "lora"]) == 2
    assert "have weights of their own" in capsys.readouterr().err


def test_another_family(host: DiffusersHost, example: Example, brief: EMSettings) -> None:
    known = replace(start(host, example), identity=unknown_model("sd1", {"clip_l": 768}))
    with pytest.raises(UserError, match="different architecture"):
        learn_concepts(host, [example], brief, concepts=known)
