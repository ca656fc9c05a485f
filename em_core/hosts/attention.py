"""The attention layers of diffusers' UNets: which there are, at what size, and recording of them."""

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..masks.resizing import Size
from ..model.layers import AttentionLayer, halved
from ..model.recording import AttentionRecorder, listening

CROSS, SELF = "attn2", "attn1"


def attention_modules(unet: nn.Module, kind: str) -> dict[str, Any]:
    """Map module paths to diffusers' attention modules of a kind, in network order."""
    return {name: module for name, module in unet.named_modules() if name.endswith(kind)}


def record_attention(
    unet: nn.Module, recorder: AttentionRecorder
) -> AbstractContextManager[AttentionRecorder]:
    """Let `recorder` see a diffusers UNet's attention while the context is open."""
    return listening(recorder, attention_modules(unet, CROSS) | attention_modules(unet, SELF))


def attention_layers(unet: Any, latent_size: Size, kind: str = CROSS) -> tuple[AttentionLayer, ...]:
    """Return a diffusers UNet's attention layers of a kind, from the first down block to the last up
    block."""
    levels = len(unet.config.block_out_channels)
    layers: dict[str, list[AttentionLayer]] = {"down": [], "mid": [], "up": []}
    for name in attention_modules(unet, kind):
        stage, _, rest = name.partition("_block")
        index = int(rest.split(".")[1]) if stage != "mid" else levels - 1
        level = levels - 1 - index if stage == "up" else index
        layer = AttentionLayer(name, halved(latent_size, level), localises=stage != "mid")
        layers[stage].append(layer)
    return (*layers["down"], *layers["mid"], *layers["up"])
