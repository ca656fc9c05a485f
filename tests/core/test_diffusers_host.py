"""The diffusers host, with diffusers' own code as the oracle."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from em_core.demo import model_path
from em_core.errors import UserError
from em_core.hosts.diffusers import (
    DiffusersHost,
    cross_attention_modules,
    describe_layers,
    require_plain_model,
)
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.model.adapters import differences_applied, init_lora, lora_applied
from em_core.model.columns import select_columns
from em_core.model.recording import AttentionRecorder
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import run
from em_core.settings import JointSettings

PLAIN = ConceptPrompt.parse("a photo of star and circle on grass")


def test_a_concept_with_a_words_vector_is_that_word(host: DiffusersHost) -> None:
    prompt = ConceptPrompt.parse("a photo of <x:star> and circle on grass")
    vectors = {"x": host.initial_vectors("star", 1, torch.Generator())}
    found = host.encode_prompts([prompt, PLAIN], vectors)
    assert torch.equal(found.y[0], found.y[1])
    assert found.columns == ({"x": (4,)}, {})
    assert found.end == (9, 9) or found.end[0] == found.end[1]


def test_plain_prompts_are_encoded_as_the_pipeline_does(host: DiffusersHost) -> None:
    expected, empty = host.pipeline.encode_prompt(PLAIN.plain(), "cpu", 1, True)
    found = host.encode_prompts([PLAIN, ConceptPrompt(())], {}).y
    assert torch.equal(found[:1], expected) and torch.equal(found[1:], empty)


def test_generation_is_the_pipelines(host: DiffusersHost) -> None:
    ours = host.generate(PLAIN, {}, [4], steps=4, guidance=3.0)
    theirs = host.pipeline(
        PLAIN.plain(), num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_schedule_adds_noise_as_diffusers_does(host: DiffusersHost) -> None:
    oracle = DDPMScheduler.from_config(host.pipeline.scheduler.config)
    Z0, eps = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(host.schedule.add_noise(Z0, eps, t), oracle.add_noise(Z0, eps, t))
    v = replace(host.schedule, prediction="v_prediction").target(Z0, eps, t)
    torch.testing.assert_close(v, oracle.get_velocity(Z0, eps, t))


class Explicit:
    """A diffusers attention processor that computes and keeps the whole probabilities."""

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(project(x))
            for project, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        probabilities = attn.get_attention_scores(q, k)
        self.probabilities.append(probabilities)
        out = attn.batch_to_head_dim(probabilities @ v)
        return attn.to_out[1](attn.to_out[0](out))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
def test_recorded_maps_equal_an_explicit_processor(
    host: DiffusersHost, size: tuple[int, int]
) -> None:
    g = torch.Generator().manual_seed(0)
    Z, t = torch.randn(2, 4, *size, generator=g), torch.tensor([100, 700])
    conditioning = host.encode_prompts([PLAIN, PLAIN], {})
    columns = [[[4], [4, 6]], [[6], []]]
    recorder = AttentionRecorder(select_columns(columns, 77), size)
    with host.record_attention(recorder):
        noise = host.predict_noise(Z, t, conditioning)
    modules = cross_attention_modules(host.unet)
    explicit = {name: Explicit() for name in modules}
    before = {name: module.processor for name, module in modules.items()}
    for name, module in modules.items():
        module.set_processor(explicit[name])
    oracle_noise = host.predict_noise(Z, t, conditioning)
    for name, module in modules.items():
        module.set_processor(before[name])
    torch.testing.assert_close(noise, oracle_noise, atol=2e-5, rtol=0)
    assert set(recorder.maps) == set(modules)
    for name, maps in recorder.maps.items():
        heads = modules[name].heads
        P = explicit[name].probabilities[0].unflatten(0, (2, heads)).mean(dim=1)
        for b in range(2):
            for k, positions in enumerate(columns[b]):
                expected = P[b][:, positions].mean(dim=-1) if positions else torch.zeros(P.shape[1])
                torch.testing.assert_close(maps[b, k].flatten(), expected, atol=1e-6, rtol=0)


def test_hooks_are_gone_also_after_an_exception(host: DiffusersHost) -> None:
    recorder = AttentionRecorder(select_columns([[[1]]], 77), (16, 16))
    with pytest.raises(RuntimeError, match="on purpose"), host.record_attention(recorder):
        raise RuntimeError("on purpose")
    assert not any(m._forward_hooks for m in host.unet.modules())
    with pytest.raises(RuntimeError, match="on purpose"), host.concepts_in_place([{}], {}):
        raise RuntimeError("on purpose")
    assert not any(m._forward_hooks for m in host.text_encoder.modules())


def test_layers_of_the_real_topology() -> None:
    """SD 1.5's UNet at reduced width: 16 cross-attention layers at the scales that the paper has."""
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, attention_head_dim=4,
        layers_per_block=2, norm_num_groups=32,
    )  # fmt: skip
    found = [(layer.stage, layer.downscale) for layer in describe_layers(unet)]
    expected = [("down", 1)] * 2 + [("down", 2)] * 2 + [("down", 4)] * 2 + [("mid", 8)]
    assert found == expected + [("up", 4)] * 3 + [("up", 2)] * 3 + [("up", 1)] * 3


def test_lora_equals_merged_weights(host: DiffusersHost) -> None:
    """Hooks W x + s B A x against the same UNet with s B A added to its weights."""
    layers = host.adaptable_layers()
    g = torch.Generator().manual_seed(0)
    tensors = {n: p.detach() for n, p in init_lora(layers, 2, g).items()}
    tensors = {
        n: torch.randn(x.shape, generator=g) * 0.05 if "up" in n else x for n, x in tensors.items()
    }
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300])

    def noise() -> torch.Tensor:
        return host.predict_noise(Z, t, host.encode_prompts([PLAIN], {}))

    with torch.no_grad():
        plain = noise()
        with lora_applied(layers, tensors, 0.5):
            hooked = noise()
        merged = {
            f"{path}.weight.diff": 0.5 * tensors[path + ".lora_up"] @ tensors[path + ".lora_down"]
            for path in layers
        }
        with differences_applied(host.weights("full"), merged):
            added = noise()
        assert torch.equal(noise(), plain)
    torch.testing.assert_close(hooked, added, atol=1e-5, rtol=0)
    assert not torch.allclose(hooked, plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "cross_attention", "full"])
def test_learned_weights_act_after_saving_as_they_did(
    host, example, short, tmp_path, kind: str
) -> None:
    """The prediction at the end of the joint phase is that of the base model with the file applied."""
    joint = JointSettings(kind=kind, steps=2, learning_rate=1e-3)
    problem = prepare(host, [example], replace(short, steps=2), joint)
    state, seen = initialise(problem), []
    prompt, g = example.prompt, torch.Generator().manual_seed(0)
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300])

    @torch.no_grad()
    def noise(vectors) -> torch.Tensor:
        return host.predict_noise(Z, t, host.encode_prompts([prompt], vectors))

    run(problem, state, [lambda event, s: seen.append(noise(s.vectors))])
    conclude(problem, state).save(tmp_path / "c.safetensors")
    loaded = ConceptSet.load(tmp_path / "c.safetensors")
    untouched = noise(loaded.vectors)
    with host.adapted(loaded.weights, loaded.lora_scale):
        torch.testing.assert_close(noise(loaded.vectors), seen[-1], atol=1e-5, rtol=0)
    assert torch.equal(noise(loaded.vectors), untouched) and not torch.equal(untouched, seen[-1])


def test_unknown_words_are_refused_with_those_that_are_known(host: DiffusersHost) -> None:
    with pytest.raises(UserError, match=r"does not know the word 'zebra'. It knows: .*star"):
        host.encode_prompts([ConceptPrompt.parse("a photo of zebra")], {})


@pytest.mark.parametrize("words", ["собака", "犬", "!!!", "star3"])
def test_no_word_slips_through(host: DiffusersHost, words: str) -> None:
    """Neither other scripts nor signs that the demo model was never shown become vectors of 0."""
    with pytest.raises(UserError, match=r"does not know|never taught"):
        host.initial_vectors(words, 1, torch.Generator())


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"cross_attention_dim": 2048}])
def test_inpainting_models_and_other_kinds_are_refused(host: DiffusersHost, change: dict) -> None:
    unet = SimpleNamespace(config=SimpleNamespace(**{**host.unet.config, **change}))
    with pytest.raises(UserError, match="no plain Stable Diffusion"):
        require_plain_model(unet, host.text_encoder)


def test_the_shipped_folder_is_a_plain_pipeline() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_path(), safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    assert pipeline.unet.config.cross_attention_dim == 64


@pytest.mark.parametrize("name", ["empty", "model.safetensors", "model.ckpt", "missing"])
def test_what_is_no_model(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif name != "missing":
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"Could not load|No model at"):
        DiffusersHost.load(path)
