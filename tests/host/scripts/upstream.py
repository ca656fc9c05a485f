"""Nodes before Learn Concepts and Extract Latent Masks: the MODEL acts as it does in sampling.

The oracle is the prediction that ComfyUI's own sampling gives for the same patched MODEL and CLIP.
"""

import copy
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from inside import import_pack, part, start_comfyui

start_comfyui()
import_pack()

import comfy.lora  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules import attention  # noqa: E402

import nodes  # noqa: E402

EM = part("em_core.settings").EMSettings
Masks = part("em_core.settings").MaskSettings
Prompt = part("em_core.prompts").ConceptPrompt
UserError = part("em_core.errors").UserError
find, hosts = part("nodes.host.families").identify, part("nodes.host.comfy_host")
model_path = part("em_core.demo").model_path
TEXT, SIZE = "a photo of <rex:red star> and <doll:heart> on grass", (1, 4, 32, 32)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


def core_prediction(model: Any, clip: Any, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """What ComfyUI's sampling predicts as the clean latent, before any guidance."""
    seen = {}
    model = model.clone()

    def look(args: dict[str, Any]) -> torch.Tensor:
        seen["x_0"] = args["cond_denoised"].clone()
        return args["denoised"]

    def once(predict: Any, x_T: Any, sigmas: Any, extra_args: Any, **others: Any) -> torch.Tensor:
        return predict(x, torch.full((len(x),), sigma), **extra_args)

    model.set_model_sampler_post_cfg_function(look)
    text = Prompt.parse(TEXT).plain()
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    comfy.sample.sample_custom(
        model, torch.zeros_like(x), 1.0, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]),
        positive, positive, torch.zeros_like(x), disable_pbar=True,
    )  # fmt: skip
    return seen["x_0"]


def our_prediction(host: Any, x: torch.Tensor, t: int) -> tuple[torch.Tensor, Any]:
    """The same from a host, and the vectors that stand for the concepts."""
    prompt = Prompt.parse(TEXT)
    vectors = {
        c.name: {
            name: v.detach().clone().requires_grad_(host.learning)
            for name, v in host.initial_vectors(c.words, None, torch.Generator()).items()
        }
        for c in prompt.concepts
    }
    given = host.encode_prompts([prompt] * len(x), vectors)
    sigma = host.sigmas[t]
    root = (sigma**2 + 1).sqrt()
    out = host.predict(x / root, torch.full((len(x),), t), given)
    x_0 = x - out * sigma if host.prediction == "epsilon" else x / root**2 - out * sigma / root
    return x_0, vectors


def acts_as_in_sampling(
    model: Any,
    clip: Any,
    vae: Any,
    oracle: Any = None,
    size: int = 32,
    times: tuple[int, ...] = (300, 900),
) -> None:
    """Both hosts predict what sampling does, with a gradient where it is learned, and a run works."""
    models, x = (
        find(model, clip, vae),
        torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0)),
    )
    sigmas = model.get_model_object("model_sampling").sigmas
    noisy = {t: x * (float(sigmas[t]) ** 2 + 1) ** 0.5 for t in times}
    expected = {
        t: core_prediction(oracle or model, clip, noisy[t], float(sigmas[t])) for t in times
    }
    host = hosts.ComfyHost(models)
    for t in times:
        torch.testing.assert_close(our_prediction(host, noisy[t], t)[0], expected[t], **CLOSE)
    host.release()
    with hosts.learning_host(models, torch.float32) as host:
        for t in times:
            found, vectors = our_prediction(host, noisy[t].clone(), t)
            torch.testing.assert_close(found.detach(), expected[t], **CLOSE)
            found.square().mean().backward()
            for v in (v for of in vectors.values() for v in of.values()):
                assert torch.isfinite(v.grad).all() and v.grad.any()
        learn(host)


def learn(host: Any, **changes: Any) -> Any:
    """A short run; its last state."""
    em = EM(**{"steps": 1, "e_step_every": 1, "batch": 2, "refresh": 1,
               "masks": Masks(init_timesteps=2, crf=None)} | changes)  # fmt: skip
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    example = part("em_core.examples").Example(picture, Prompt.parse(TEXT))
    problem = part("em_core.method.problem").prepare(host, [example], em)
    state = part("em_core.method.start").initialise(problem)
    return part("em_core.runs.runner").run(problem, state)


def node(module: str, name: str, *args: Any) -> Any:
    """What a node of ComfyUI's own makes of its inputs."""
    found = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)
    if hasattr(found, "execute"):
        result = found.execute(*args)
        return (result if isinstance(result, tuple) else result.result)[0]
    return getattr(found(), found.FUNCTION)(*args)[0]


with torch.inference_mode():
    demo = part("nodes.host.demo_model").load_demo_model(model_path())
CASES: dict[str, Callable[[Any, Any, Any], Any]] = {}


def case(make: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    CASES[make.__name__] = make
    return make


def refused(model: Any, clip: Any, vae: Any, *words: str) -> None:
    """Learning says these words, which are the artist's."""
    try:
        with hosts.learning_host(find(model, clip, vae), torch.float32) as host:
            learn(host)
    except UserError as error:
        for expected in words:
            assert expected in str(error), f"{expected!r} is missing in: {error}"
    else:
        raise AssertionError(f"not refused: {words}")


@contextmanager
def exchanged(place: Any, **values: Any) -> Iterator[None]:
    """Other values under some names of a module while the context is open."""
    before = {name: getattr(place, name) for name in values}
    try:
        for name, value in values.items():
            setattr(place, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)


@case
def plain(model: Any, clip: Any, vae: Any) -> None:
    acts_as_in_sampling(model, clip, vae)


@case
def freeu(model: Any, clip: Any, vae: Any) -> None:
    """It changes in place what autograd has saved."""
    acts_as_in_sampling(node("nodes_freelunch", "FreeU_V2", model, 1.3, 1.4, 0.9, 0.2), clip, vae)


@case
def guidance(model: Any, clip: Any, vae: Any) -> None:
    """PAG acts on what guidance makes of predictions, not on the prediction that is learned from."""
    acts_as_in_sampling(node("nodes_pag", "PerturbedAttentionGuidance", model, 3.0), clip, vae)


@case
def hypertile(model: Any, clip: Any, vae: Any) -> None:
    """It draws its tiles at random: here both sides draw the same, and ours does so every time."""
    import comfy_extras.nodes_hypertile as module

    tiled = node("nodes_hypertile", "HyperTile", model, 64, 3, 1, False)
    with exchanged(module, randint=lambda low, high, size: torch.full(size, high - 1)):
        acts_as_in_sampling(tiled, clip, vae)
    same_every_time(tiled, clip, vae)


@case
def token_merging(model: Any, clip: Any, vae: Any) -> None:
    merged, draw = node("nodes_tomesd", "TomePatchModel", model, 0.3), torch.randint

    def lowest(high: int, *size: Any, **others: Any) -> torch.Tensor:
        return draw(high, *size, **others) * ("generator" in others)

    with exchanged(torch, randint=lowest):
        acts_as_in_sampling(merged, clip, vae)
    same_every_time(merged, clip, vae)


def same_every_time(model: Any, clip: Any, vae: Any) -> None:
    """A patch's random numbers are the same in every call, and in what checkpointing computes again."""
    x, results = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)), []
    for checkpointed in (False, False, True):
        with (
            hosts.learning_host(find(model, clip, vae), torch.float32) as host,
            part("nodes.host.checkpointing").checkpointing(host.unet, checkpointed),
        ):
            found, vectors = our_prediction(host, x.clone(), 500)
            found.square().mean().backward()
            results.append((found.detach(), vectors["rex"]["clip_l"].grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[2], results[0])


@case
def deep_shrink(model: Any, clip: Any, vae: Any) -> None:
    """Only in a part of the schedule, and to sizes that no halving gives."""
    for factor, size in ((2.0, 32), (1.5, 36)):
        shrunk = node("nodes_model_downscale", "PatchModelAddDownscale", model, 3, factor, 0.0, 0.5, True,
                      "bicubic", "bicubic")  # fmt: skip
        acts_as_in_sampling(shrunk, clip, vae, size=size)


@case
def compiled(model: Any, clip: Any, vae: Any) -> None:
    """Learned on and looked at as it is without the compiler, which gives the same values."""
    made = node("nodes_torch_compile", "TorchCompileModel", model, "inductor")
    acts_as_in_sampling(made, clip, vae, oracle=model)
    old = model.clone()
    old.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model))
    acts_as_in_sampling(old, clip, vae, oracle=model)


@case
def skipping_steps(model: Any, clip: Any, vae: Any) -> None:
    acts_as_in_sampling(
        node("nodes_easycache", "EasyCacheNode", model, 0.2, 0.15, 0.95, False), clip, vae
    )


@case
def something_else_runs(model: Any, clip: Any, vae: Any) -> None:
    """A wrapper that gives what it once had, and a patch that fails: both are named."""
    cached = model.clone()
    cached.set_model_unet_function_wrapper(lambda run, call: call["input"])
    refused(
        cached,
        clip,
        vae,
        "something else in the UNet's place",
        "something_else_runs",
        "from before",
    )
    broken = model.clone()
    broken.set_model_attn2_patch(lambda n, context, value, options: options["no such thing"])
    refused(broken, clip, vae, "it fails", "something_else_runs", "Learn Concepts")


@case
def adapters(model: Any, clip: Any, vae: Any) -> None:
    """LoRA, LoCon, DoRA and LoHa on the UNet and the text encoder."""
    for kind in ("lora", "locon", "dora", "loha"):
        patched = comfy.sd.load_lora_for_models(model, clip, adapter(model, clip, kind), 0.8, 0.8)
        acts_as_in_sampling(*patched, vae)
        assert differs(model, clip, *patched), kind


@case
def bypassed_adapters(model: Any, clip: Any, vae: Any) -> None:
    """Newer versions add a LoRA to the layers' outputs instead of their weights."""
    load = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    for kind in ("lora", "locon", "loha") if load else ():
        patched = load(model, clip, adapter(model, clip, kind), 0.8, 0.8)
        acts_as_in_sampling(*patched, vae)
        assert differs(model, clip, *patched), kind
    if load:
        acts_as_in_sampling(model, clip, vae)  # nothing of it stays behind
        paged, reloaded = patched[0].clone(), patched[0].clone()
        reloaded.model = copy.copy(model.model)
        paged.is_dynamic, paged.clone = lambda: True, lambda **how: reloaded
        refused(paged, clip, vae, "another copy of the model")


def differs(model: Any, clip: Any, other_model: Any, other_clip: Any) -> bool:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    two = [core_prediction(*of, x, 1.0) for of in ((model, clip), (other_model, other_clip))]
    return bool((two[0] - two[1]).abs().max() > 1e-3)


def adapter(model: Any, clip: Any, kind: str) -> dict[str, torch.Tensor]:
    """Random weights of a kind, as files hold them, for linear and convolutional layers."""
    g = torch.Generator().manual_seed(2)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    names |= comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    weights = dict(model.model.named_parameters()) | dict(clip.cond_stage_model.named_parameters())
    made: dict[str, torch.Tensor] = {}
    for name, key in names.items():
        if name.startswith("lora_") and re.search(r"attn2_to_[qv]|fc1|in_layers_2", name):
            made |= factors(name, kind, weights[key], g)
    assert any(x.ndim == 4 for x in made.values()) == (kind == "locon")
    return made


def factors(
    name: str, kind: str, weight: torch.Tensor, g: torch.Generator
) -> dict[str, torch.Tensor]:
    """One layer's random weights."""
    (out, inner), rest = weight.shape[:2], weight.shape[2:]
    if rest and kind != "locon":
        return {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g) * 0.2

    if kind == "loha":
        return {f"{name}.hada_w{i}_a": random(out, 2) for i in (1, 2)} | {
            f"{name}.hada_w{i}_b": random(2, inner) for i in (1, 2)
        }
    pair = {
        f"{name}.lora_up.weight": random(out, 2, *([1] * len(rest))),
        f"{name}.lora_down.weight": random(2, inner, *rest),
        f"{name}.alpha": torch.tensor(2.0),
    }
    dora = {f"{name}.dora_scale": weight.float().norm(dim=0, keepdim=True) * 1.1}
    return pair | (dora if kind == "dora" else {})


@case
def image_adapter(model: Any, clip: Any, vae: Any) -> None:
    """What IPAdapter and its kin do: attention to tokens of a picture is added in every block."""
    acts_as_in_sampling(with_picture(model, attention.optimized_attention), clip, vae)


def with_picture(model: Any, attend: Any) -> Any:
    """A MODEL with a patch that pays attention to tokens of a picture, in the late part of the schedule."""
    tokens = torch.randn(1, 4, 1, generator=torch.Generator().manual_seed(3))

    def look(q: Any, k: Any, v: Any, options: Any) -> Any:
        text = attend(q, k, v, options["n_heads"])
        if options["sigmas"][0].item() > 5:
            return text
        picture = tokens.expand(len(q), 4, k.shape[-1]).to(k)
        return text + 0.5 * attend(q, picture, picture * 0.3, options["n_heads"])

    patched = model.clone()
    for part_, number in (
        ("input", 1),
        ("input", 3),
        ("middle", 0),
        *[("output", i) for i in range(4)],
    ):
        patched.set_model_attn2_replace(look, part_, number)
    return patched


@case
def one_time_in_a_batch(model: Any, clip: Any, vae: Any) -> None:
    """Such patches look at the first sample's time alone, so a batch of a patched MODEL has one time."""
    seen = []

    def look(n: Any, context: Any, value: Any, options: Any) -> Any:
        seen.append(options["sigmas"].tolist())
        return n, context, value

    patched = model.clone()
    patched.set_model_attn2_patch(look)
    with hosts.learning_host(find(patched, clip, vae), torch.float32) as host:
        learn(host, steps=3, batch=3)
    assert {len(times) for times in seen} == {1, 3}
    assert all(len(set(times)) == 1 for times in seen)
    assert len({times[0] for times in seen}) > 3


@case
def kernel_without_gradient(model: Any, clip: Any, vae: Any) -> None:
    """Core's own SageAttention code over a stand-in for the package: fast, and without a gradient."""

    def sageattn(
        q: Any, k: Any, v: Any, tensor_layout: str, attn_mask: Any = None, **others: Any
    ) -> Any:
        turned = [x if tensor_layout == "HND" else x.transpose(1, 2) for x in (q, k, v)]
        with torch.no_grad():
            out = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=attn_mask)
        return out if tensor_layout == "HND" else out.transpose(1, 2)

    values = {"optimized_attention": attention.attention_sage, "sageattn": sageattn,
              "optimized_attention_masked": attention.attention_sage}  # fmt: skip
    for name in ("sageattn", "SAGE_ATTENTION_SUPPORTS_MASK"):
        if not hasattr(attention, name):
            setattr(attention, name, True)
    with exchanged(attention, **values):
        acts_as_in_sampling(model, clip, vae)
        refused(with_picture(model, attention.optimized_attention), clip, vae,
                "passes no gradient on", "--use-sage-attention")  # fmt: skip
    # The same kernel as a node's override, one that is more than a kernel, and one that has a gradient.
    override = {
        "optimized_attention_override": lambda f, *a, **k: attention.attention_sage(*a, **k)
    }
    with exchanged(attention, sageattn=sageattn):
        acts_as_in_sampling(with_options(model, override), clip, vae)
    wild = {"optimized_attention_override": lambda f, *a, **k: 3 * f(*a, **k).detach()}
    refused(with_options(model, wild), clip, vae, "without a gradient", "kernel_without_gradient")
    scaled = {"optimized_attention_override": lambda f, *a, **k: 0.9 * f(*a, **k)}
    acts_as_in_sampling(with_options(model, scaled), clip, vae)


class NoBackward(torch.autograd.Function):
    """Attention by an operator that has no backward pass, as core's FlashAttention is one."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise RuntimeError("no autograd formula was registered")


@case
def operator_without_backward(model: Any, clip: Any, vae: Any) -> None:
    """Core's own FlashAttention code over a stand-in for the package, and as a node's override."""

    def flash(q: Any, k: Any, v: Any, **others: Any) -> Any:
        return NoBackward.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    values = {"optimized_attention": attention.attention_flash, "flash_attn_wrapper": flash,
              "optimized_attention_masked": attention.attention_flash}  # fmt: skip
    with exchanged(attention, **values):
        acts_as_in_sampling(model, clip, vae)
    override = {
        "optimized_attention_override": lambda f, *a, **k: attention.attention_flash(*a, **k)
    }
    with exchanged(attention, flash_attn_wrapper=flash):
        refused(with_options(model, override), clip, vae,
                "a kernel that has no gradient", "operator_without_backward")  # fmt: skip


def with_options(model: Any, options: dict[str, Any]) -> Any:
    patched = model.clone()
    patched.model_options["transformer_options"] |= options
    return patched


@case
def loss_without_gradient(model: Any, clip: Any, vae: Any) -> None:
    """Text that does not reach the UNet: Eq. 4 alone would go on as if all were well."""
    cut = model.clone()
    cut.set_model_unet_function_wrapper(
        lambda run, call: run(call["input"], call["timestep"], **call["c"]).detach()
    )
    refused(cut, clip, vae, "diffusion loss does not reach", "rex")


@case
def clip_skip(model: Any, clip: Any, vae: Any) -> None:
    skipped = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    acts_as_in_sampling(model, skipped, vae)
    assert differs(model, clip, model, skipped)


@case
def samplings(model: Any, clip: Any, vae: Any) -> None:
    """The schedule and what is predicted are those that the graph has set."""
    for zsnr in (False, True):
        for kind in ("eps", "v_prediction"):
            made = node("nodes_model_advanced", "ModelSamplingDiscrete", model, kind, zsnr)
            acts_as_in_sampling(made, clip, vae)
        for kind in ("lcm", "x0"):
            made = node("nodes_model_advanced", "ModelSamplingDiscrete", model, kind, zsnr)
            refused(made, clip, vae, "sampling is not supported", "ModelSampling")


@case
def learned_weights(model: Any, clip: Any, vae: Any) -> None:
    """Concepts bring their LoRA to the search for masks, as a loader before it would; nothing stays."""
    layers = [
        f"diffusion_model.{name}"
        for name, module in model.model.diffusion_model.named_modules()
        if name.endswith("attn2.to_k")
    ]
    shapes = {name: dict(model.model.named_parameters())[f"{name}.weight"].shape for name in layers}
    g = torch.Generator().manual_seed(4)
    weights = {f"{n}.lora_up": torch.randn(s[0], 2, generator=g) for n, s in shapes.items()}
    weights |= {f"{n}.lora_down": torch.randn(2, s[1], generator=g) for n, s in shapes.items()}
    models = find(model, clip, vae)
    host = hosts.ComfyHost(models)
    concept = part("em_core.prompts").Concept("rex")
    vectors = {"rex": host.initial_vectors("red star", None, torch.Generator())}
    learned = part("em_core.runs.concept_set").ConceptSet(
        (concept,), vectors, host.identity(), weights, lora_scale=0.05
    )
    lora = part("em_core.exchange.lora").lora_tensors(learned)
    loaded = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))

    def maps(host: Any, concepts: Any) -> torch.Tensor:
        found = part("em_core.runs.finding").find_masks(
            host, picture, "a photo of <rex> on grass", concepts, Masks(init_timesteps=4, crf=None)
        )
        host.release()
        return found.maps

    without = replace(learned, weights={})
    ours, plain = maps(host, learned), maps(host, without)
    expected = maps(hosts.ComfyHost(find(*loaded, vae)), without)
    torch.testing.assert_close(ours, expected)
    assert (ours - plain).abs().max() > 0.01
    assert torch.equal(maps(host, without), plain)


chosen = os.environ.get("CASES", "").split() or list(CASES)
for name in chosen:
    with torch.inference_mode():
        CASES[name](*demo)
    sys.stdout.write(f"{name} is fine\n")
