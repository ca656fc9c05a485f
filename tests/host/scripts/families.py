"""SD 1.x, SD 2.x (eps and v) and SDXL of ComfyUI's own classes, reduced, with random weights.

`families.py FAMILY-TYPE ...`: learns tokens and a LoRA, and checks what changed, what got gradients, and
that the exports load through ComfyUI's own loaders. Exits with an error where something is not so.
"""

import copy
import logging
import sys
from typing import Any

cases, family, weights_type = sys.argv[1:], "", ""

from inside import import_pack, part, start_comfyui  # noqa: E402

start_comfyui()
import_pack()

import comfy.lora  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as known  # noqa: E402
import torch  # noqa: E402
from comfy import sd1_clip, sdxl_clip, supported_models_base  # noqa: E402
from comfy.model_detection import convert_config  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy.text_encoders import sd2_clip  # noqa: E402

logging.disable(logging.WARNING)
DTYPE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
SMALL = {"num_hidden_layers": 3, "hidden_act": "gelu", "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 77, "eos_token_id": 49407}  # fmt: skip
ALL_WIDTHS = {"sd1": (64,), "sd2": (64,), "sd2v": (64,), "sdxl": (32, 64)}
WIDTHS: tuple[int, ...] = ()


def randomise(module: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """ComfyUI leaves new weights uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        x = x * (1.0 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.02)
        x = x + 1 if "norm" in name and name.endswith("weight") and p.ndim == 1 else x
        p.data = x.to(dtype)
        p.requires_grad_(False)


def unet() -> ModelPatcher:
    """The family's UNet with its real names, of little width."""
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2],
        "num_res_blocks": 2, "attention_resolutions": [1, 2, 4], "transformer_depth": 1,
        "use_spatial_transformer": True, "use_linear_in_transformer": family != "sd1",
        "context_dim": sum(WIDTHS), "adm_in_channels": None, "use_temporal_attention": False, "legacy": False,
        "num_heads": -1, "num_head_channels": 16,
    }  # fmt: skip
    kind = {"sd1": known.SD15, "sd2": known.SD20, "sd2v": known.SD20, "sdxl": known.SDXL}[family]
    if family == "sdxl":
        config |= {"attention_resolutions": [2, 4], "transformer_depth": [0, 1, 2], "num_classes": "sequential",
                   "adm_in_channels": 64 + 6 * 256}  # fmt: skip
    described = convert_config(config)
    extra = {name: described[name] for name in kind.unet_extra_config if name in described}
    prepared = kind(described)
    prepared.unet_config |= extra
    prepared.set_inference_dtype(torch.float32, None)
    way = (
        comfy.model_base.ModelType.V_PREDICTION
        if family == "sd2v"
        else comfy.model_base.ModelType.EPS
    )
    base_class = comfy.model_base.SDXL if family == "sdxl" else comfy.model_base.BaseModel
    base = base_class(prepared, model_type=way)
    randomise(base.diffusion_model, DTYPE[weights_type], 0)
    if weights_type != "fp32":
        base.diffusion_model.dtype, base.manual_cast_dtype = DTYPE[weights_type], torch.float32
        for m in base.diffusion_model.modules():
            if hasattr(m, "comfy_cast_weights"):
                m.comfy_cast_weights = True
    return ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def small_encoder(kind: type, width: int) -> type:
    """A text encoder class of ComfyUI with a small configuration."""

    class Small(kind):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            real = sd1_clip.SDClipModel.__init__

            def small(self: Any, *a: Any, **k: Any) -> None:
                real(self, *a, **(k | {"textmodel_json_config": dict(SMALL, hidden_size=width)}))

            sd1_clip.SDClipModel.__init__ = small
            try:
                super().__init__(*args, **kwargs)
            finally:
                sd1_clip.SDClipModel.__init__ = real

    return Small


def clip() -> comfy.sd.CLIP:
    kinds = {
        "sd1": (
            sd1_clip.SD1Tokenizer,
            sd1_clip.SD1ClipModel,
            {"clip_l_class": small_encoder(sd1_clip.SD1CheckpointClipModel, 64)},
        ),
        "sd2": (
            sd2_clip.SD2Tokenizer,
            sd2_clip.SD2ClipModel,
            {"clip_h_class": small_encoder(sd2_clip.SD2ClipHModel, 64)},
        ),
    }  # fmt: skip
    kinds["sd2v"] = kinds["sd2"]
    options: dict[str, Any] = {"dtype": torch.float32}
    if family == "sdxl":
        tokenizer = sdxl_clip.SDXLTokenizer

        class Both(sdxl_clip.SDXLClipModel):
            def __init__(
                self, device: Any = "cpu", dtype: Any = None, model_options: Any = None
            ) -> None:
                torch.nn.Module.__init__(self)
                left = small_encoder(sd1_clip.SDClipModel, WIDTHS[0])
                right = small_encoder(sdxl_clip.SDXLClipG, WIDTHS[1])
                self.clip_l = left(layer="hidden", layer_idx=-2, device=device, dtype=dtype,
                                   layer_norm_hidden_state=False, model_options={})  # fmt: skip
                self.clip_g = right(device=device, dtype=dtype, model_options={})
                self.dtypes = {dtype}

        encoder: Any = Both
    else:
        tokenizer, encoder, extra = kinds[family]
        options |= extra
    made = comfy.sd.CLIP(
        supported_models_base.ClipTarget(tokenizer, encoder),
        embedding_directory=[],
        model_options=options,
    )
    randomise(made.cond_stage_model, torch.float32, 1)
    for name, width in zip(
        ("clip_g", "clip_l", "clip_h"), (64, 32 if family == "sdxl" else 64, 64), strict=True
    ):
        if hasattr(made.tokenizer, name):
            getattr(made.tokenizer, name).embedding_size = width
    return made


def vae() -> comfy.sd.VAE:
    description = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
                   "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
                   "dropout": 0.0}  # fmt: skip
    made = comfy.sd.VAE(
        sd={}, config={"params": {"ddconfig": description, "embed_dim": 4}}, dtype=torch.float32
    )
    randomise(made.first_stage_model, torch.float32, 2)
    return made


def run() -> None:
    settings = part("em_core.settings")
    flow, plans = part("nodes.learning.flow"), part("nodes.learning.plans")
    host_module, exports = part("nodes.host.comfy_host"), part("nodes.exports")
    model, text, autoencoder = unet(), clip(), vae()
    found = part("nodes.host.families").identify(model, text)
    assert found.encoders == {"sd1": ("clip_l",), "sdxl": ("clip_l", "clip_g")}.get(
        family, ("clip_h",)
    ), found
    before = {n: x.clone() for n, x in copy.deepcopy(model.model.state_dict()).items()}
    before_text = {n: x.clone() for n, x in text.cond_stage_model.state_dict().items()}
    em = settings.EMSettings(steps=3, e_step_every=2, batch=2, vectors=2, image_side=128, refresh=1,
                             masks=settings.MaskSettings(init_timesteps=2, crf=None))  # fmt: skip
    joint = settings.JointSettings(kind="lora", steps=2, learning_rate=0.1)
    prompt = part("em_core.concepts").ConceptPrompt.parse(
        "a photo of <rex:red dog> and <doll> on grass"
    )
    picture = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
    example = part("em_core.examples").Example(picture, prompt)
    joint_kept = check_learning(host_module, model, text, autoencoder, example, em, joint, flow)
    check_unchanged(model, text, before, before_text)
    check_exports(exports, host_module, joint_kept, model, text, autoencoder, prompt)
    checkpointed = plans.PLANS[2]
    assert checkpointed.checkpointing
    check_checkpointing(host_module, model, text, autoencoder, example, em)


def check_learning(
    host_module: Any,
    model: Any,
    text: Any,
    autoencoder: Any,
    example: Any,
    em: Any,
    joint: Any,
    flow: Any,
) -> Any:
    """Gradients reach every encoder's vectors; the schedule is of the right kind."""
    learn, conclude = part("em_core.em"), part("em_core.concept_set").conclude
    with host_module.learning_host(model, text, autoencoder, torch.float32) as host:
        assert host.schedule.prediction == ("v_prediction" if family == "sd2v" else "epsilon")
        problem = part("em_core.problem").prepare(host, [example], em, joint)
        state = learn.initialise(problem)
        start = {
            (c, e): v.detach().clone() for c, of in state.vectors.items() for e, v in of.items()
        }
        part("em_core.runner").run(problem, state)
        for (c, e), v in start.items():
            assert not torch.equal(state.vectors[c][e], v), f"{c} {e} did not learn"
            assert torch.isfinite(state.vectors[c][e]).all()
        ups = {n: w for n, w in state.weights.items() if n.endswith("lora_up")}
        moved = {n for n, w in ups.items() if w.abs().max() > 0}
        assert any(n.startswith("diffusion_model") for n in moved)
        for name in host.encoders:
            assert any(n.startswith(name) for n in moved), f"no gradient in the LoRA of {name}"
        return conclude(problem, state)


def check_unchanged(model: Any, text: Any, before: dict, before_text: dict) -> None:
    """The user's weights are bit for bit what they were."""
    for module, kept in ((model.model, before), (text.cond_stage_model, before_text)):
        now = module.state_dict()
        assert set(now) == set(kept)
        for n, x in kept.items():
            same = torch.equal(now[n].view(torch.uint8) if x.element_size() == 1 else now[n],
                               x.view(torch.uint8) if x.element_size() == 1 else x)  # fmt: skip
            assert same, n


def check_exports(
    exports: Any,
    host_module: Any,
    concepts: Any,
    model: Any,
    text: Any,
    autoencoder: Any,
    prompt: Any,
) -> None:
    """ComfyUI's loader matches every key, and gives what was learned."""
    lora = exports.lora_tensors(concepts)
    assert lora and all(n.startswith(("lora_unet_", "lora_te")) for n in lora)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(text.cond_stage_model, keys)
    matched = comfy.lora.load_lora(lora, keys)
    assert len(matched) == len([n for n in lora if n.endswith(".alpha")]), "a key was not matched"
    if weights_type == "fp32":
        loaded_model, loaded_text = comfy.sd.load_lora_for_models(model, text, lora, 1.0, 1.0)
        compare_outputs(
            host_module, concepts, (model, text), (loaded_model, loaded_text), autoencoder, prompt
        )
    for name in concepts.names:
        embedding = exports.embedding_tensors(concepts, name)
        assert set(embedding) == ({"clip_l", "clip_g"} if family == "sdxl" else {"emb_params"})


def compare_outputs(
    host_module: Any, concepts: Any, plain: Any, loaded: Any, autoencoder: Any, prompt: Any
) -> None:
    """UNet with the LoRA as it was trained (on its layers), and merged by ComfyUI's loader."""
    weights = part("em_core.weights")
    Z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([50, 700])
    with torch.no_grad(), host_module.learning_host(*plain, autoencoder, torch.float32) as host:
        layers = host.adaptable_layers()
        with weights.lora_applied(layers, concepts.weights, concepts.lora_scale):
            ours = host.predict_noise(
                Z, t, host.encode_prompts([prompt] * 2, concepts.vectors)
            ).clone()
        without = host.predict_noise(
            Z, t, host.encode_prompts([prompt] * 2, concepts.vectors)
        ).clone()
    stock_host = host_module.ComfyHost(*loaded, autoencoder)
    stock = stock_host.predict_noise(
        Z, t, stock_host.encode_prompts([prompt] * 2, concepts.vectors)
    )
    effect, error = (ours - without).abs().max(), (ours - stock).abs().max()
    assert effect > 1e-3, f"the LoRA does nothing ({effect:.1e})"
    assert error < 0.02 * effect, (
        f"loaded differs by {error:.1e}, the LoRA's effect is {effect:.1e}"
    )


def check_checkpointing(
    host_module: Any, model: Any, text: Any, autoencoder: Any, example: Any, em: Any
) -> None:
    """Recomputing activations changes nothing: same losses, with and without."""
    found = []
    for on in (False, True):
        with (
            host_module.learning_host(model, text, autoencoder, torch.float32) as host,
            part("nodes.host.checkpointing").checkpointing(host.unet, on),
        ):
            problem = part("em_core.problem").prepare(host, [example], em)
            state = part("em_core.em").initialise(problem)
            part("em_core.runner").run(problem, state)
            found.append(torch.tensor([v for _, v in state.curves["loss/total"]]))
    torch.testing.assert_close(found[0], found[1])


with torch.inference_mode():
    for case in cases:
        family, weights_type = case.split("-")
        WIDTHS = ALL_WIDTHS[family]
        run()
        sys.stdout.write(f"{case} is fine\n")
