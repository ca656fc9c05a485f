"""MODEL, CLIP and VAE of ComfyUI's own classes with real key names, reduced, with random weights."""

from typing import Any

from inside import start_comfyui

start_comfyui()

import comfy.model_base  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as known  # noqa: E402
import torch  # noqa: E402
from comfy import sd1_clip, sdxl_clip, supported_models_base  # noqa: E402
from comfy.model_detection import convert_config  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy.text_encoders import sd2_clip  # noqa: E402

DTYPE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
SMALL = {"num_hidden_layers": 3, "hidden_act": "gelu", "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 77, "eos_token_id": 49407}  # fmt: skip
WIDTHS = {"sd1": (64,), "sd2": (64,), "sd2v": (64,), "sdxl": (32, 64)}


def randomise(module: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """ComfyUI leaves new weights uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        x = torch.randn(p.shape, generator=generator)
        x = x * (1.0 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.02)
        x = x + 1 if "norm" in name and name.endswith("weight") and p.ndim == 1 else x
        p.data = x.to(dtype)
        p.requires_grad_(False)


def unet(family: str, weights_type: str = "fp32") -> ModelPatcher:
    """The family's UNet with its real names, of little width."""
    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2],
        "num_res_blocks": 2, "attention_resolutions": [1, 2, 4], "transformer_depth": 1,
        "use_spatial_transformer": True, "use_linear_in_transformer": family != "sd1",
        "context_dim": sum(WIDTHS[family]), "adm_in_channels": None, "use_temporal_attention": False,
        "legacy": False, "num_heads": -1, "num_head_channels": 16,
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


def clip(family: str, dtype: torch.dtype = torch.float32) -> comfy.sd.CLIP:
    """The family's text encoders with their real names, of little width."""
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
    options: dict[str, Any] = {"dtype": dtype}
    if family == "sdxl":
        tokenizer = sdxl_clip.SDXLTokenizer

        class Both(sdxl_clip.SDXLClipModel):
            def __init__(
                self, device: Any = "cpu", dtype: Any = None, model_options: Any = None
            ) -> None:
                torch.nn.Module.__init__(self)
                left = small_encoder(sd1_clip.SDClipModel, WIDTHS["sdxl"][0])
                right = small_encoder(sdxl_clip.SDXLClipG, WIDTHS["sdxl"][1])
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
    """An autoencoder of factor 8."""
    description = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
                   "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
                   "dropout": 0.0}  # fmt: skip
    made = comfy.sd.VAE(
        sd={}, config={"params": {"ddconfig": description, "embed_dim": 4}}, dtype=torch.float32
    )
    randomise(made.first_stage_model, torch.float32, 2)
    return made
