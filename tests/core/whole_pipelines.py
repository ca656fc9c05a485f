"""Pipelines of diffusers at full size on the meta device, and the bytes of a step on them."""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from small_models import tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from em_core.demo import model_path
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.m_step import m_step
from em_core.method.problem import Prepared, Problem
from em_core.method.state import PictureState, RunState
from em_core.model.layers import finest_size, region_layers
from em_core.model.plans import Attempt
from em_core.prompts import ConceptPrompt
from em_core.settings import EMSettings, JointSettings

sys.path.append(str(Path(__file__).parents[1] / "host" / "scripts"))
from counting import Bytes

META = torch.device("meta")
PROMPT = ConceptPrompt.parse("a photo of <rex:dog> and <doll:doll> on grass")
READING = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*READING[0], "DownBlock2D"), "up_block_types": ("UpBlock2D", *READING[1]),
    },
    "sdxl": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "sample_size": 128,
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", *READING[0][:2]),
        "up_block_types": (*READING[1][:2], "UpBlock2D"),
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def clip(width: int, layers: int, heads: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        hidden_act=activation, projection_dim=width, vocab_size=49408, eos_token_id=49407,
        bos_token_id=49406,
    )  # fmt: skip


def pipeline(family: str) -> Any:
    """A pipeline without values, but for its schedule."""
    words = tokenizers(model_path() / "tokenizer")
    schedule = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    with META:
        parts = {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "vae": AutoencoderKL(**AUTOENCODER),
            "text_encoder": CLIPTextModel(clip(768, 12, 12, "quick_gelu")),
            "scheduler": schedule,
        }
        if family == "sdxl":
            large = CLIPTextModelWithProjection(clip(1280, 32, 20, "gelu"))
            return StableDiffusionXLPipeline(
                text_encoder_2=large, add_watermarker=False, **parts, **words
            )
    return StableDiffusionPipeline(
        tokenizer=words["tokenizer"], safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **parts,
    )  # fmt: skip


def fused(q: Any, k: Any, v: Any, attn_mask: Any = None, *_: Any, **more: Any) -> torch.Tensor:
    """Attention by an operator that saves what every fused kernel does: q, k, v, out and logsumexp."""
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    options = {"attn_mask": attn_mask, "scale": more.get("scale")}
    return call(q, k, v, 0.0, more.get("is_causal", False), **options)[0]


def counted(host: DiffusersHost, attempt: Attempt, side: int) -> int:
    """The most that tensors take in a step that learns tokens."""
    host.loss_scale, z, n = attempt.loss_scale, side // 8, len(PROMPT.names)
    layers = host.attention_layers((z, z))
    among = region_layers(host.self_attention_layers((z, z)))
    example = Example(torch.zeros(3, 64, 64), PROMPT)

    def blank(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=META)

    latent = blank(1, 4, z, z)
    prepared = Prepared(example, (side, side), latent, None, layers, among, None)
    settings = EMSettings(batch=attempt.batch, image_side=side)
    problem = Problem(host, (prepared,), PROMPT.concepts, settings, JointSettings())
    maps, labels = blank(n, *finest_size(layers)), blank(n, side, side)
    found = torch.ones(n, dtype=torch.bool)
    picture = PictureState(maps, maps.clone(), blank(n), labels, labels > 0.5, found)
    vectors = {c: {one.name: blank(1, one.width) for one in host.encoders} for c in PROMPT.names}
    state = RunState(vectors, torch.Generator().get_state(), (picture,))
    with Bytes() as bytes_:
        for module in (host.unet, *(encoder.model for encoder in host.encoders)):
            bytes_.add_module(module)
        for first in (True, False):
            state = m_step(problem, state, first)[0]
    return bytes_.peak
