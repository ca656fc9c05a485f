"""The diffusers host, with diffusers' own code as the oracle."""

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from em_core.demo import model_path
from em_core.errors import UserError
from em_core.hosts.attention import CROSS, attention_layers, attention_modules
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.loading import require_plain_model
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.model.adapters import differences_applied, exchanged, init_lora, lora_applied
from em_core.model.columns import select_columns
from em_core.model.protocol import DiffusionModel
from em_core.model.recording import AttentionRecorder
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import run
from em_core.settings import JointSettings

PLAIN = ConceptPrompt.parse("a photo of star and circle on grass")


def recorder_of(host: DiffusersHost, columns: list, size: tuple[int, int]) -> AttentionRecorder:
    layers = {layer.name: layer for layer in host.attention_layers(size)}
    return AttentionRecorder({"text": select_columns(columns, 77)}, layers)


def test_the_host_fulfils_the_protocol(host: DiffusersHost) -> None:
    assert isinstance(host, DiffusionModel)


def test_a_concept_with_a_words_vector_is_that_word(host: DiffusersHost) -> None:
    prompt = ConceptPrompt.parse("a photo of <x:star> and circle on grass")
    vectors = {"x": host.initial_vectors("star", 1, torch.Generator())}
    found = host.encode_prompts([prompt, PLAIN], vectors)
    assert torch.equal(found.inputs["y"][0], found.inputs["y"][1])
    text = found.streams["text"]
    assert text.columns == ({"x": (4,)}, {}) and text.end == (9, 9) and text.length == 77


def test_plain_prompts_are_encoded_as_the_pipeline_does(host: DiffusersHost) -> None:
    expected, empty = host.pipeline.encode_prompt(PLAIN.plain(), "cpu", 1, True)
    found = host.encode_prompts([PLAIN, ConceptPrompt(())], {}).inputs["y"]
    assert torch.equal(found[:1], expected) and torch.equal(found[1:], empty)


def test_generation_is_the_pipelines(host: DiffusersHost) -> None:
    ours = host.generate(PLAIN, None, [4], steps=4, guidance=3.0)
    theirs = host.pipeline(
        PLAIN.plain(), num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_schedule_adds_noise_as_diffusers_does(host: DiffusersHost) -> None:
    oracle = DDPMScheduler.from_config(host.pipeline.scheduler.config)
    Z0, eps = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    t = torch.tensor([0, 500, 999])
    noisy = host.schedule.add_noise(Z0, eps, t.float())
    torch.testing.assert_close(noisy, oracle.add_noise(Z0, eps, t))
    v = replace(host.schedule, prediction="v_prediction").target(Z0, eps, t.float())
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
    Z, t = torch.randn(2, 4, *size, generator=g), torch.tensor([100.0, 700.0])
    conditioning = host.encode_prompts([PLAIN, PLAIN], {})
    columns = [[[4], [4, 6]], [[6], []]]
    recorder = recorder_of(host, columns, size)
    with host.record_attention(recorder):
        noise = host.predict(Z, t, conditioning)
    modules = attention_modules(host.unet, CROSS)
    explicit = {name: Explicit() for name in modules}
    before = {name: module.processor for name, module in modules.items()}
    for name, module in modules.items():
        module.set_processor(explicit[name])
    oracle_noise = host.predict(Z, t, conditioning)
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
    recorder = recorder_of(host, [[[1]]], (16, 16))
    lora = init_lora(host.adaptable_layers(), 2, torch.Generator())
    contexts = (
        host.record_attention(recorder),
        host.encoders[0].concepts_in_place([{}], {}),
        host.applied(lora, 1.0),
        host.trainable("lora", {}, torch.Generator(), 2, 2.0),
    )
    for context in contexts:
        with pytest.raises(RuntimeError, match="on purpose"), context:
            assert hooks(host) > 0
            raise RuntimeError("on purpose")
        assert hooks(host) == 0


def hooks(host: DiffusersHost) -> int:
    return sum(len(m._forward_hooks) for _, part in host.modules() for m in part.modules())


def addresses(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, tuple[int, bool, bool]]:
    """Where each parameter's values lie, and whether it is learned."""
    return {n: (p.data_ptr(), p.requires_grad, p.grad is None) for n, p in parameters.items()}


@pytest.mark.parametrize("way", ["cross_attention", "full", "differences"])
@pytest.mark.parametrize("fails", [False, True])
def test_exchanged_weights_come_back_as_the_very_same_tensors(
    host: DiffusersHost, way: str, fails: bool
) -> None:
    parameters = host.weights("full")
    before = addresses(parameters)
    values = {name: p.detach().clone() for name, p in parameters.items()}
    if way == "differences":
        context = host.applied({f"{n}.diff": torch.ones_like(p) for n, p in values.items()}, 1.0)
    else:
        context = host.trainable(way, {}, torch.Generator())
    try:
        with context:
            elsewhere = [n for n, p in parameters.items() if p.data_ptr() != before[n][0]]
            assert elsewhere == list(parameters if way != "cross_attention" else host.weights(way))
            if way != "differences":
                for p in (parameters[n] for n in elsewhere):
                    p.grad = torch.ones_like(p)
            with torch.no_grad():
                for n in elsewhere:
                    parameters[n].add_(1)
            if fails:
                raise RuntimeError("on purpose")
    except RuntimeError as error:
        assert fails and str(error) == "on purpose"
    assert addresses(parameters) == before
    assert all(torch.equal(p, values[n]) for n, p in parameters.items())


def test_an_exchange_that_fails_halfway_is_undone(host: DiffusersHost) -> None:
    parameters = host.weights("cross_attention")
    before = addresses(parameters)
    values = {name: torch.zeros_like(p) for name, p in list(parameters.items())[:-1]}
    with pytest.raises(KeyError), exchanged(parameters, values):
        pass
    assert addresses(parameters) == before


def test_exchanged_values_hold_what_became_of_them() -> None:
    parameter, value = torch.nn.Parameter(torch.zeros(3)), torch.ones(3)
    with exchanged({"a": parameter}, {"a": value}) as own, torch.no_grad():
        assert torch.equal(own["a"], torch.zeros(3))
        parameter.add_(1)
    assert torch.equal(value, torch.full((3,), 2.0)) and torch.equal(parameter, torch.zeros(3))


def test_layers_of_the_real_topology() -> None:
    """SD 1.5's UNet at reduced width: 16 cross-attention layers at the scales that the paper has."""
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64), cross_attention_dim=32, attention_head_dim=4,
        layers_per_block=2, norm_num_groups=32,
    )  # fmt: skip
    layers = attention_layers(unet, (64, 64))
    found = [(layer.name.partition("_block")[0], 64 // layer.size[0]) for layer in layers]
    expected = [("down", 1)] * 2 + [("down", 2)] * 2 + [("down", 4)] * 2 + [("mid", 8)]
    assert found == expected + [("up", 4)] * 3 + [("up", 2)] * 3 + [("up", 1)] * 3
    assert all(layer.size[0] == layer.size[1] for layer in layers)
    assert [layer.localises for layer in layers] == [stage != "mid" for stage, _ in found]
    assert {layer.name for layer in layers} == attention_modules(unet, CROSS).keys()


def test_lora_equals_merged_weights(host: DiffusersHost) -> None:
    """Hooks W x + s B A x against the same UNet with s B A added to its weights."""
    layers = host.adaptable_layers()
    g = torch.Generator().manual_seed(0)
    tensors = {n: p.detach() for n, p in init_lora(layers, 2, g).items()}
    tensors = {
        n: torch.randn(x.shape, generator=g) * 0.05 if "up" in n else x for n, x in tensors.items()
    }
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300.0])

    def noise() -> torch.Tensor:
        return host.predict(Z, t, host.encode_prompts([PLAIN], {}))

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
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300.0])

    @torch.no_grad()
    def noise(vectors) -> torch.Tensor:
        return host.predict(Z, t, host.encode_prompts([prompt], vectors))

    state = run(problem, state, [lambda event, s: seen.append(noise(s.vectors))])
    conclude(problem, state).save(tmp_path / "c.safetensors")
    loaded = ConceptSet.load(tmp_path / "c.safetensors")
    untouched = noise(loaded.vectors)
    with host.applied(loaded.weights, loaded.lora_scale):
        torch.testing.assert_close(noise(loaded.vectors), seen[-1], atol=1e-5, rtol=0)
    assert torch.equal(noise(loaded.vectors), untouched) and not torch.equal(untouched, seen[-1])


def test_unknown_words_are_refused_with_those_that_are_known(host: DiffusersHost) -> None:
    with pytest.raises(
        UserError, match=r"does not know the word 'zebra'. It knows: a, an, and, black, .*star"
    ):
        host.encode_prompts([ConceptPrompt.parse("a photo of zebra")], {})
    host.encode_prompts([ConceptPrompt.parse("a photo of sks")], {})  # a trigger word is not listed


@pytest.mark.parametrize(
    "words", ["\u0441\u043e\u0431\u0430\u043a\u0430", "\u72ac", "!!!", "star3"]
)
def test_no_word_slips_through(host: DiffusersHost, words: str) -> None:
    """Neither other scripts nor signs that the demo model was never shown become vectors of 0."""
    with pytest.raises(UserError, match=r"does not know|never taught"):
        host.initial_vectors(words, 1, torch.Generator())


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"cross_attention_dim": 2048}])
def test_inpainting_models_and_other_kinds_are_refused(host: DiffusersHost, change: dict) -> None:
    unet = SimpleNamespace(config=SimpleNamespace(**{**host.unet.config, **change}))
    pipeline = SimpleNamespace(unet=unet, text_encoder=host.pipeline.text_encoder)
    with pytest.raises(UserError, match="not a plain Stable Diffusion"):
        require_plain_model(pipeline)


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


@pytest.fixture
def loads(host: DiffusersHost, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """The arguments of every call of diffusers' loader, which gives the demo model here."""
    calls: list[tuple[tuple, dict]] = []

    def from_pretrained(cls: type, *args: object, **options: object) -> object:
        calls.append((args, options))
        return host.pipeline

    def load_config(cls: type, *args: object, **options: object) -> dict[str, str]:
        assert "local_files_only" in options or isinstance(args[0], str)
        return {"_class_name": "StableDiffusionPipeline"}

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(DiffusionPipeline, "load_config", classmethod(load_config))
    return calls


def test_a_hub_name_is_left_to_diffusers_without_pickles(loads: list) -> None:
    DiffusersHost.load("owner/some-model.v2")
    ((args, options),) = loads
    assert args == ("owner/some-model.v2",) and options["use_safetensors"] is True
    assert not options.get("local_files_only")


def test_a_folder_is_read_without_a_network(
    loads: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its path could be the name of a model on the hub."""
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    DiffusersHost.load("owner/model")
    ((args, options),) = loads
    assert args == (Path("owner/model"),)
    assert options["local_files_only"] is True and options["use_safetensors"] is True


@pytest.mark.parametrize("name", ["model", "a/b/c", "../model", "/owner/model", "owner/", "a b/c"])
def test_what_is_no_hub_name_is_never_looked_up(loads: list, name: str) -> None:
    with pytest.raises(UserError, match="No model at"):
        DiffusersHost.load(name)
    assert not loads


def test_a_file_is_no_hub_name(
    loads: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="No model at"):
        DiffusersHost.load("owner/model")
    assert not loads


class Trap:
    """An object whose pickle makes a file where it is opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "opened"))
    pickle.loads(trap)  # noqa: S301
    (tmp_path / "opened").unlink()
    folder = tmp_path / "model"
    shutil.copytree(model_path(), folder)
    for weights in folder.rglob("*.safetensors"):
        name = "pytorch_model" if weights.stem == "model" else weights.stem
        weights.with_name(f"{name}.bin").write_bytes(trap)
        weights.unlink()
    with pytest.raises(UserError, match="Could not load"):
        DiffusersHost.load(folder)
    (tmp_path / "model.ckpt").write_bytes(trap)
    with pytest.raises(UserError, match="No model at"):
        DiffusersHost.load(tmp_path / "model.ckpt")
    assert not (tmp_path / "opened").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here() -> None:
    with pytest.raises(UserError, match="No device 'cuda' on this machine"):
        DiffusersHost.load(model_path(), device="cuda")
