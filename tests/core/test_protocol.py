"""The protocol is enough: a model of quite another kind learns through the public door."""

from dataclasses import replace

import pytest
import torch
from toy_host import CHANNELS, ToyHost

import em_core
from em_core import EMSettings, Example, JointSettings, MaskSettings, learn_concepts
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.crf import DEMO
from em_core.masks.measures import iou
from em_core.model.protocol import DiffusionModel
from em_core.prompts import ConceptPrompt

ROSE, SKY = (0.95, 0.45, 0.5), (0.3, 0.45, 0.8)
MASKS = MaskSettings(init_timesteps=10, timesteps=(0.0, 0.4), threshold=0.5, crf=DEMO)
SETTINGS = EMSettings(
    steps=30,
    learning_rate=0.02,
    batch=4,
    e_step_every=10,
    refresh=4,
    attention_weight=0.1,
    masks=MASKS,
)


def scene() -> Example:
    """A rose disc and a sky-blue square on grey; neither colour has a word."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = (y - 10) ** 2 + (x - 9) ** 2 < 40
    square = ((y - 21).abs() < 7) & ((x - 22).abs() < 6)
    picture = torch.full((3, 32, 32), 0.5)
    for mask, colour in ((disc, ROSE), (square, SKY)):
        picture[:, mask] = torch.tensor(colour)[:, None]
    prompt = ConceptPrompt.parse("<rex:red> and <doll:blue> on grey")
    return Example(picture, prompt, truth={"rex": disc, "doll": square})


@pytest.mark.parametrize("kind", [ToyHost, DiffusersHost])
def test_hosts_fulfil_the_protocol(kind: type, host: DiffusersHost) -> None:
    assert isinstance(ToyHost() if kind is ToyHost else host, DiffusionModel)


def test_two_concepts_are_learned_and_found() -> None:
    """The tokens go to the colours of their things, and the masks to the things."""
    host, example = ToyHost(), scene()
    concepts = learn_concepts(host, [example], SETTINGS)
    for name, colour, word in (("rex", ROSE, "red"), ("doll", SKY, "blue")):
        learned, wanted = concepts.vectors[name]["colours"][0], host.word(colour)
        start = host.initial_vectors(word, 1, torch.Generator())["colours"][0]
        assert torch.dist(learned, wanted) < 0.5 * torch.dist(start, wanted)
        assert float(iou(concepts.masks[0][name], example.truth[name])) > 0.8
    found = em_core.find_masks(host, example.picture, "<rex> and <doll> on grey", concepts, MASKS)
    truth = torch.stack([example.truth[name] for name in found.names])
    assert float(iou(found.masks, truth).min()) > 0.8


def test_recorded_attention_is_the_models_own() -> None:
    """What the recorder keeps under the softmax over words and pixels is what the model computes."""
    host, example = ToyHost(), scene()
    prompt = example.prompt
    vectors = {c.name: host.initial_vectors(c.words, 1, torch.Generator()) for c in prompt.concepts}
    learned = learn_concepts(host, [example], replace(SETTINGS, steps=1, mode="fixed"))
    assert learned.masks[0]["rex"].any()
    Z = host.encode_image(example.picture[None] * 2 - 1)
    assert Z.shape == (1, CHANNELS, 16, 16)
    conditioning = host.encode_prompts([prompt], vectors)
    from em_core.method.maps import recorder_for

    layers = host.attention_layers((16, 16))
    recorder = recorder_for(conditioning, prompt.names, layers, host)
    with host.record_attention(recorder):
        host.predict(Z, torch.tensor([0.02]), conditioning)
    (maps,) = recorder.maps.values()
    assert maps.shape == (1, 3, 16, 16)  # two concepts and the end of the text
    assert 0 < float(maps[:, :2].sum(dim=1).max()) < 1  # pixels share the softmax
    assert host.recorder is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_are_learned_with_the_tokens_and_given_back(kind: str) -> None:
    host = ToyHost()
    joint = JointSettings(kind, steps=4, learning_rate=1e-2, prior_weight=0.5, prior_prompt="red")
    concepts = learn_concepts(host, [scene()], replace(SETTINGS, steps=4), joint)
    assert torch.equal(host.values.weight, torch.eye(CHANNELS))
    changed = {"lora": "values.lora_up", "full": "values.weight.diff"}[kind]
    assert concepts.weights[changed].abs().max() > 0
