"""SD 1.x, SD 2.x (eps and v) and SDXL of ComfyUI's own classes, reduced, with random weights.

`families.py FAMILY-TYPE-JOINT ...`: learns tokens and then weights, and checks what changed, what got
gradients, and that the exports load through ComfyUI's own loaders. Exits with an error where something is
not so.
"""

import copy
import logging
import sys
from dataclasses import replace
from typing import Any

cases, family, weights_type, kind = sys.argv[1:], "", "", ""

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

logging.disable(logging.WARNING)


def run() -> None:
    settings = part("em_core.settings")
    plans = part("em_core.model.plans")
    host_module, exports = part("nodes.host.comfy_host"), part("em_core.exchange.lora")
    # ComfyUI keeps text encoders in half precision; the phase that trains them has to cope with it.
    text_type = torch.float16 if kind == "full" else torch.float32
    model, text = reduced.unet(family, weights_type), reduced.clip(family, text_type)
    autoencoder = reduced.vae()
    models = part("nodes.host.families").identify(model, text, autoencoder)
    encoders = {"sd1": ["clip_l"], "sdxl": ["clip_l", "clip_g"]}.get(family, ["clip_h"])
    assert list(models.encoders) == encoders, models
    before = {n: x.clone() for n, x in copy.deepcopy(model.model.state_dict()).items()}
    before_text = {n: x.clone() for n, x in text.cond_stage_model.state_dict().items()}
    em = settings.EMSettings(steps=3, e_step_every=2, batch=2, vectors=2, image_side=128, refresh=1,
                             masks=settings.MaskSettings(init_timesteps=2, crf=None))  # fmt: skip
    joint = settings.JointSettings(kind=kind, steps=2, learning_rate=0.1 if kind == "lora" else 1e-3,
                                   prior_weight=float(kind == "full"), prior_pictures=1)  # fmt: skip
    prompt = part("em_core.prompts").ConceptPrompt.parse(
        "a photo of <rex:red dog> and <doll> on grass"
    )
    picture = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
    example = part("em_core.examples").Example(picture, prompt)
    joint_kept = check_learning(host_module, models, example, em, joint)
    check_unchanged(model, text, before, before_text)
    check_exports(exports, host_module, joint_kept, models, prompt)
    checkpointed = plans.PLANS[1]
    assert checkpointed.recompute
    check_checkpointing(host_module, models, example, em)


def check_learning(host_module: Any, models: Any, example: Any, em: Any, joint: Any) -> Any:
    """Gradients reach every encoder's vectors; the schedule is of the right kind."""
    start_of, conclude = (
        part("em_core.method.start").initialise,
        part("em_core.runs.concept_set").conclude,
    )
    types = (torch.float32, torch.float32 if kind == "full" else None)
    with host_module.learning_host(models, *types) as host:
        assert host.schedule.prediction == ("v_prediction" if family == "sd2v" else "epsilon")
        problem = part("em_core.method.problem").prepare(host, [example], em, joint)
        state = start_of(problem)
        start = {
            (c, e): v.detach().clone() for c, of in state.vectors.items() for e, v in of.items()
        }
        state = part("em_core.runs.runner").run(problem, state)
        for (c, e), v in start.items():
            assert not torch.equal(state.vectors[c][e], v), f"{c} {e} did not learn"
            assert torch.isfinite(state.vectors[c][e]).all()
        concepts = conclude(problem, state)
        check_moved(host, concepts.weights)
        prior = [step for step, _ in state.curves.get("joint_loss/prior", [])]
        assert prior == ([1, 2] if kind == "full" else [])
        return concepts


def check_moved(host: Any, weights: Any) -> None:
    """The weights of the joint phase, and no others, have changed; in every part that takes part."""
    moved = {n for n, w in weights.items() if w.abs().max() > 0 and not n.endswith(".lora_down")}
    assert any(n.startswith("diffusion_model") for n in moved)
    if kind == "cross_attention":
        assert moved and all(".attn2.to_k." in n or ".attn2.to_v." in n for n in moved), moved
        return
    for name in host.models.encoders:
        assert any(n.startswith(name) for n in moved), f"no gradient in the weights of {name}"


def check_unchanged(model: Any, text: Any, before: dict, before_text: dict) -> None:
    """The user's weights are bit for bit what they were."""
    for module, kept in ((model.model, before), (text.cond_stage_model, before_text)):
        now = module.state_dict()
        assert set(now) == set(kept)
        for n, x in kept.items():
            same = torch.equal(now[n].view(torch.uint8) if x.element_size() == 1 else now[n],
                               x.view(torch.uint8) if x.element_size() == 1 else x)  # fmt: skip
            assert same, n


def check_exports(exports: Any, host_module: Any, concepts: Any, models: Any, prompt: Any) -> None:
    """ComfyUI's loader matches every key, and gives what was learned."""
    lora, model, text = exports.lora_tensors(concepts), models.model, models.clip
    prefixes = (
        ("lora_unet_", "lora_te") if kind == "lora" else ("diffusion_model.", "text_encoders.")
    )
    assert lora and all(n.startswith(prefixes) for n in lora)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(text.cond_stage_model, keys)
    matched = comfy.lora.load_lora(lora, keys)
    ends = (".alpha", ".diff", ".diff_b")
    assert len(matched) == len([n for n in lora if n.endswith(ends)]), "a key was not matched"
    if weights_type == "fp32":
        loaded_model, loaded_text = comfy.sd.load_lora_for_models(model, text, lora, 1.0, 1.0)
        loaded = replace(models, model=loaded_model, clip=loaded_text)
        compare_outputs(host_module, concepts, models, loaded, prompt)
    for name in concepts.names:
        embedding = part("em_core.exchange.embeddings").embedding_tensors(concepts, name)
        assert set(embedding) == ({"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"})


def compare_outputs(host_module: Any, concepts: Any, plain: Any, loaded: Any, prompt: Any) -> None:
    """UNet with the weights as they were trained (on its layers), and merged by ComfyUI's loader."""
    Z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([50.0, 700.0])
    with torch.no_grad(), host_module.learning_host(plain, torch.float32) as host:
        with applied(host, concepts):
            ours = host.predict(Z, t, host.encode_prompts([prompt] * 2, concepts.vectors)).clone()
        without = host.predict(Z, t, host.encode_prompts([prompt] * 2, concepts.vectors)).clone()
    stock_host = host_module.ComfyHost(loaded)
    stock = stock_host.predict(Z, t, stock_host.encode_prompts([prompt] * 2, concepts.vectors))
    effect, error = (ours - without).abs().max(), (ours - stock).abs().max()
    assert effect > 1e-3, f"the weights do nothing ({effect:.1e})"
    assert error < 0.02 * effect, f"loaded differs by {error:.1e}, the effect is {effect:.1e}"
    stock_host.release()
    check_reading(host_module.ComfyHost(plain), concepts, prompt, (Z, t), stock, without)


def check_reading(
    reader: Any, concepts: Any, prompt: Any, noisy: Any, stock: Any, without: Any
) -> None:
    """A host that only reads the user's model applies the weights as the loader does, and no longer."""

    def predict() -> torch.Tensor:
        encoded = reader.encode_prompts([prompt] * 2, concepts.vectors)
        return reader.predict(*noisy, encoded).clone()

    with reader.applied(concepts.weights, concepts.lora_scale):
        torch.testing.assert_close(predict(), stock)
    torch.testing.assert_close(predict(), without, atol=1e-4, rtol=1e-4)
    reader.release()


def applied(host: Any, concepts: Any) -> Any:
    """Context in which the host's own copy acts with the learned weights."""
    weights = part("em_core.model.adapters")
    if kind == "lora":
        return weights.lora_applied(host.adaptable_layers(), concepts.weights, concepts.lora_scale)
    return weights.differences_applied(host.weights(kind), concepts.weights)


def check_checkpointing(host_module: Any, models: Any, example: Any, em: Any) -> None:
    """Recomputing activations changes nothing: same losses, with and without."""
    found = []
    for on in (False, True):
        with (
            host_module.learning_host(models, torch.float32) as host,
            part("nodes.host.checkpointing").checkpointing(host.unet, on),
        ):
            problem = part("em_core.method.problem").prepare(host, [example], em)
            state = part("em_core.method.start").initialise(problem)
            state = part("em_core.runs.runner").run(problem, state)
            found.append(torch.tensor([v for _, v in state.curves["loss/total"]]))
    torch.testing.assert_close(found[0], found[1])


with torch.inference_mode():
    for case in cases:
        family, weights_type, kind = case.split("-")
        run()
        sys.stdout.write(f"{case} is fine\n")
