"""Cross-attention of ComfyUI's UNet: which layers there are, and listening to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from comfy.ldm.modules.attention import CrossAttention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from torch import Tensor, nn

from ...em_core.model.layers import CrossAttentionLayer
from ...em_core.model.recording import AttentionRecorder, listening

STAGES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}


def cross_attention_modules(unet: nn.Module) -> dict[str, CrossAttention]:
    """Module path -> every cross-attention (attn2), in network order."""
    return {
        name: m
        for name, m in unet.named_modules()
        if isinstance(m, CrossAttention) and name.endswith("attn2")
    }


def describe_layers(unet: Any) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers with their scale and stage."""
    scales = block_scales(unet)
    layers = []
    for name in cross_attention_modules(unet):
        part, _, rest = name.partition(".")
        block = part if part == "middle_block" else f"{part}.{rest.partition('.')[0]}"
        layers.append(CrossAttentionLayer(name, scales[block], STAGES[part]))
    return tuple(layers)


def block_scales(unet: Any) -> dict[str, int]:
    """Block path -> latent side / side at which the block's attention works."""
    scales, scale = {}, 1
    for i, block in enumerate(unet.input_blocks):
        scale *= 2 if has(block, Downsample) else 1
        scales[f"input_blocks.{i}"] = scale
    scales["middle_block"] = scale
    for i, block in enumerate(unet.output_blocks):
        scales[f"output_blocks.{i}"] = scale
        scale //= 2 if has(block, Upsample) else 1
    return scales


def has(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(m, kind) for m in block.modules())


@dataclass
class TextColumns:
    """A recorder's front for keys that a patch of another pack has appended tokens to.

    They take part in the softmax, and no concept stands in them.
    """

    recorder: AttentionRecorder

    def wants(self, layer: str) -> bool:
        return self.recorder.wants(layer)

    def record(self, layer: str, q: Tensor, k: Tensor, heads: int) -> None:
        missing = k.shape[1] - self.recorder.select.shape[-1]
        if missing:
            self.recorder.select = F.pad(self.recorder.select, (0, missing))
        self.recorder.record(layer, q, k, heads)


@contextmanager
def record_attention(unet: nn.Module, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
    """Let `recorder` see the queries and keys of the UNet's cross-attention while the context is open."""
    modules = cross_attention_modules(unet)
    projections = {name: (m.to_q, m.to_k, m.heads) for name, m in modules.items()}
    front: Any = TextColumns(recorder)
    with listening(front, projections):
        yield recorder
