"""MODEL and CLIP of ComfyUI's own classes at full size, on the meta device: shapes without values."""

from typing import Any

from inside import start_comfyui

start_comfyui()

import comfy.clip_model  # noqa: E402
import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.ldm.modules.diffusionmodules.model as autoencoding  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models as known  # noqa: E402
import torch  # noqa: E402
from comfy import sd1_clip, sdxl_clip, supported_models_base  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.model_detection import convert_config  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from comfy.text_encoders import sd2_clip  # noqa: E402
from torch import Tensor  # noqa: E402

META = torch.device("meta")
COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2,
    "use_spatial_transformer": True, "adm_in_channels": None, "use_temporal_attention": False,
    "legacy": False,
}  # fmt: skip
STABLE = {"channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "transformer_depth": 1}
UNETS = {
    "sd1": STABLE | {"context_dim": 768, "num_heads": 8, "num_head_channels": -1,
                     "use_linear_in_transformer": False},
    "sd2": STABLE | {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64,
                     "use_linear_in_transformer": True},
    "sdxl": {"channel_mult": [1, 2, 4], "attention_resolutions": [2, 4], "transformer_depth": [0, 2, 10],
             "context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "adm_in_channels": 2816,
             "num_classes": "sequential", "use_linear_in_transformer": True},
}  # fmt: skip
AUTOENCODER = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
PLANS = {
    "float32": "float32",
    "float32r": "float32, recomputing",
    "half": "half",
    "halfr": "half, recomputing",
    "fp8": "fp8, recomputing",
}
"""Memory plans by the short names that cases have."""
KINDS = {"sd1": known.SD15, "sd2": known.SD20, "sdxl": known.SDXL}
CLIPS = {
    "sd1": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
    "sd2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
    "sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
}


def unet(family: str, **changes: Any) -> ModelPatcher:
    """The family's UNet in fp16, as a checkpoint holds it; with changes, one of other depths."""
    described = convert_config(COMMON | UNETS[family]) | changes
    kind = KINDS[family]
    extra = {name: described[name] for name in kind.unet_extra_config if name in described}
    prepared = kind(described)
    prepared.unet_config |= extra
    prepared.set_inference_dtype(torch.float16, None)
    base_class = comfy.model_base.SDXL if family == "sdxl" else comfy.model_base.BaseModel
    base = base_class(prepared, model_type=comfy.model_base.ModelType.EPS, device="meta")
    base.diffusion_model.to("meta")
    sampling = base.model_sampling  # what is read of it has values, what steps use is on the device
    sampling.log_sigmas = sampling.log_sigmas.to("meta")
    return ModelPatcher(base, load_device=META, offload_device=META)


def clip(family: str) -> comfy.sd.CLIP:
    """The family's text encoders in fp16."""
    tokenizer, encoder = CLIPS[family]
    made = comfy.sd.CLIP(
        supported_models_base.ClipTarget(tokenizer, encoder),
        embedding_directory=[],
        model_options={"dtype": torch.float16},
    )
    made.cond_stage_model.to("meta", torch.float16)
    made.patcher.load_device = made.patcher.offload_device = META
    return made


class Autoencoder:
    """What a graph's models are asked of their VAE, which is in float32, as on cards without bf16."""

    latent_channels, latent_dim = 4, 2

    def __init__(self) -> None:
        # On a card, torch's own attention is used, which is `fused` here.
        autoencoding.vae_attention = lambda: autoencoding.pytorch_attention
        with META:
            self.first_stage_model = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4).eval()

    def spacial_compression_encode(self) -> int:
        return 8


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Attention by an operator that saves what every fused kernel does: q, k, v, out and logsumexp."""
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return call(q, k, v, 0.0, False, attn_mask=attn_mask)[0]


def use_fused_attention() -> None:
    """Let ComfyUI's models attend by `fused`; on the meta device, torch itself would choose no kernel."""
    for module in (torch.nn.functional, comfy.ops):
        if hasattr(module, "scaled_dot_product_attention"):
            module.scaled_dot_product_attention = fused
    attention.optimized_attention = attention.attention_pytorch
    attention.optimized_attention_masked = attention.attention_pytorch
    comfy.clip_model.optimized_attention_for_device = lambda *_, **__: attention.attention_pytorch
