"""The loss that holds what lies around the masks to the untouched model's prediction."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.resizing import resize
from em_core.method.joint import learn_joint
from em_core.method.m_step import condition, forward_backward
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.prompts import ConceptPrompt
from em_core.settings import EMSettings, JointSettings, WeightKind

KINDS: list[WeightKind] = ["lora", "cross_attention", "full"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(parameters: dict) -> None:
    """Change all that can be learned, and give it gradients."""
    g = seeded(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
            parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_the_untouched_model_is_the_base_and_what_was_learned_comes_back(
    host: DiffusersHost, kind: WeightKind
) -> None:
    """Bit for bit, in UNet and text encoder; the learned values and their gradients are kept."""
    Z, t = torch.randn(2, 4, 16, 16, generator=seeded()), torch.tensor([300.0, 800.0])
    prompts = [ConceptPrompt(("a photo of a red circle",))] * 2

    @torch.no_grad()
    def predicted() -> Tensor:
        return host.predict(Z, t, host.encode_prompts(prompts, {}))

    base = predicted()
    with host.trainable(kind, {}, seeded()) as parts:
        moved(parts.parameters)
        changed, learned = predicted(), parts.learned()
        with parts.untouched():
            assert torch.equal(predicted(), base)
        assert torch.equal(predicted(), changed) and not torch.equal(changed, base)
        assert all(torch.equal(value, learned[name]) for name, value in parts.learned().items())
        assert all(bool((p.grad == 1).all()) for p in parts.parameters.values())
        with pytest.raises(RuntimeError, match="inside"), parts.untouched():
            raise RuntimeError("inside")
        assert torch.equal(predicted(), changed)
    assert torch.equal(predicted(), base)


def test_the_term_by_hand(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """A sum over the pixels outside each sample's own masks, divided by their number, in float64."""
    weight = 0.7
    joint = JointSettings("lora", surroundings_weight=weight)
    problem = prepare(host, [example], replace(short, batch=3), joint)
    state = replace(initialise(problem), phase="joint")
    with host.trainable("lora", {}, seeded()) as parts:
        moved(parts.parameters)
        plain = forward_backward(problem, state, seeded(3))[1]
        drawn, found, _ = forward_backward(problem, state, seeded(3), untouched=parts.untouched)
        Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
        with torch.no_grad():
            after = host.predict(Z_t, drawn.t, condition(problem, state, drawn))
    terms = {name: float(value.detach()) for name, value in found.items()}
    texts = ["".join(x for x in p.parts if isinstance(x, str)) for p in drawn.prompts]
    with torch.no_grad():
        given = host.encode_prompts([ConceptPrompt((text,)) for text in texts], {})
        before = host.predict(Z_t, drawn.t, given)
    each = []
    for i, subset in enumerate(drawn.subsets):
        shown = [drawn.masks[i, k] for k, n in enumerate(problem.pictures[0].names) if n in subset]
        inside = torch.stack([resize(mask, (16, 16), "mask") for mask in shown]).amax(dim=0)
        outside = 1 - inside.double()
        error = (outside * (after[i] - before[i]).double()).square().sum()
        each.append(error / (outside.square().sum() * after.shape[1]))
    expected = torch.stack(each).mean()
    assert terms["surroundings"] == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) > 0
    total = float(plain["total"].detach()) + weight * float(expected)
    assert terms["total"] == pytest.approx(total, rel=1e-4)
    assert torch.equal(found["diffusion"], plain["diffusion"])


def around_after(
    host: DiffusersHost, example: Example, settings: EMSettings, weight: float
) -> float:
    """How far a short joint phase of all weights has moved the prediction outside the masks."""
    joint = JointSettings("full", steps=16, learning_rate=3e-4, surroundings_weight=weight)
    problem = prepare(host, [example], replace(settings, batch=2), joint)
    *_, (_, state) = learn_joint(problem, initialise(problem))
    assert state.phase == "joint" and state.step == joint.steps
    with host.trainable("full", state.weights, seeded()) as parts:
        values = [
            forward_backward(problem, state, seeded(seed), untouched=parts.untouched)[1]
            for seed in range(8)
        ]
    return sum(float(terms["surroundings"].detach()) for terms in values) / len(values)


def test_what_lies_around_moves_less_with_it(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    free = around_after(host, example, short, 0.0)
    assert around_after(host, example, short, 1.0) < 0.8 * free


def test_only_whole_weights_have_it_unless_it_is_asked_for() -> None:
    assert [JointSettings(kind).surroundings for kind in KINDS] == [0.0, 0.0, 1.0]
    assert JointSettings("full", surroundings_weight=0.0).surroundings == 0
    assert JointSettings("lora", surroundings_weight=2.0).surroundings == 2


def test_without_masks_there_is_nothing_around_them(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """The loss of a run without masks is of the whole picture, and has no such term."""
    joint = JointSettings("full", steps=1, learning_rate=1e-4)
    problem = prepare(host, [example], replace(short, mode="none"), joint)
    ((event, _),) = learn_joint(problem, initialise(problem))
    assert "surroundings" not in event.losses


def test_a_prompt_without_its_concepts() -> None:
    prompt = ConceptPrompt.parse("a photo of <rex:dog> and <doll> on sand")
    assert str(prompt.bare()) == "a photo of  and  on sand"
    assert not prompt.bare().names
