"""Cross-attention of ComfyUI's UNet: which layers there are, and listening to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy.ldm.modules.attention import CrossAttention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from torch import nn

from ...em_core.masks.resizing import Size
from ...em_core.model.layers import AttentionLayer, halved
from ...em_core.model.recording import AttentionRecorder, listening


def cross_attention_modules(unet: nn.Module) -> dict[str, CrossAttention]:
    """Module path -> every cross-attention (attn2), in network order."""
    return {
        name: m
        for name, m in unet.named_modules()
        if isinstance(m, CrossAttention) and name.endswith("attn2")
    }


def attention_layers(unet: Any, latent_size: Size) -> tuple[AttentionLayer, ...]:
    """The cross-attention layers for latents of a size. The innermost block does not localise."""
    levels = block_levels(unet)
    layers = []
    for name in cross_attention_modules(unet):
        part, _, rest = name.partition(".")
        inner = part == "middle_block"
        block = part if inner else f"{part}.{rest.partition('.')[0]}"
        layers.append(AttentionLayer(name, halved(latent_size, levels[block]), not inner))
    return tuple(layers)


def block_levels(unet: Any) -> dict[str, int]:
    """Block path -> how often the latent has been halved where the block's attention works."""
    levels, level = {}, 0
    for i, block in enumerate(unet.input_blocks):
        level += has(block, Downsample)
        levels[f"input_blocks.{i}"] = level
    levels["middle_block"] = level
    for i, block in enumerate(unet.output_blocks):
        levels[f"output_blocks.{i}"] = level
        level -= has(block, Upsample)
    return levels


def has(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(m, kind) for m in block.modules())


@contextmanager
def record_attention(unet: nn.Module, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
    """Let `recorder` see the queries and keys of the UNet's cross-attention while the context is open."""
    modules = cross_attention_modules(unet)
    projections = {name: (m.to_q, m.to_k, m.heads) for name, m in modules.items()}
    with listening(recorder, projections):
        yield recorder
