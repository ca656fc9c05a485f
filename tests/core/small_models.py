"""Small pipelines of diffusers with random weights, which share the demo model's tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from em_core.demo import model_path

WIDTHS = {"clip_l": 32, "clip_g": 64}
PROJECTED, TIME = 48, 8


def clip_config(width: int, **changes: Any) -> CLIPTextConfig:
    known = {
        "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "hidden_act": "gelu", "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406,
        "projection_dim": PROJECTED,
    }  # fmt: skip
    return CLIPTextConfig(**known | changes)


def tokenizers(folder: Path) -> dict[str, CLIPTokenizer]:
    """SDXL's two, which fill prompts up with the end token and with "!"."""
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder, pad_token="!"),  # noqa: S106
    }


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    known = {
        "sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": sum(WIDTHS.values()), "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": TIME,
        "projection_class_embeddings_input_dim": PROJECTED + 6 * TIME,
    }  # fmt: skip
    return UNet2DConditionModel(**known | changes)


def sdxl(**changes: Any) -> StableDiffusionXLPipeline:
    """SDXL's parts at little width: 64 px, latents of 32x32, text read at 16x16."""
    torch.manual_seed(0)
    parts: Mapping[str, Any] = {
        "unet": sdxl_unet(),
        "vae": AutoencoderKL(
            block_out_channels=(32, 32), latent_channels=4, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "text_encoder": CLIPTextModel(clip_config(WIDTHS["clip_l"])),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(WIDTHS["clip_g"])),
        **tokenizers(model_path() / "tokenizer"),
        "scheduler": EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        "add_watermarker": False,
    }  # fmt: skip
    return StableDiffusionXLPipeline(**parts | changes)
