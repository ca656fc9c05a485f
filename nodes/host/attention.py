"""Attention of ComfyUI's UNet: listing its layers and listening to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from comfy.ldm.modules.attention import CrossAttention, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample
from torch import nn

from ...em_core.masks.resizing import Size
from ...em_core.model.layers import AttentionLayer, halved
from ...em_core.model.recording import AttentionRecorder, listening

CROSS, SELF = "attn2", "attn1"


def attention_modules(unet: nn.Module, kind: str) -> dict[str, CrossAttention]:
    """Map module paths to the attention modules of a kind, in network order."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, CrossAttention) and name.endswith(kind)
    }


def attention_layers(unet: Any, latent_size: Size, kind: str = CROSS) -> tuple[AttentionLayer, ...]:
    """Return the attention layers of a kind for latents of a size. The innermost block does not
    localise."""
    levels = block_levels(unet)
    layers = []
    for name in attention_modules(unet, kind):
        part, _, rest = name.partition(".")
        inner = part == "middle_block"
        block = part if inner else f"{part}.{rest.partition('.')[0]}"
        layers.append(AttentionLayer(name, halved(latent_size, levels[block]), not inner))
    return tuple(layers)


def block_levels(unet: Any) -> dict[str, int]:
    """Map block paths to how often the latent has been halved where the block's attention works."""
    levels, level = {}, 0
    for index, block in enumerate(unet.input_blocks):
        level += has(block, Downsample)
        levels[f"input_blocks.{index}"] = level
    levels["middle_block"] = level
    for index, block in enumerate(unet.output_blocks):
        levels[f"output_blocks.{index}"] = level
        level -= has(block, Upsample)
    return levels


def has(block: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in block.modules())


@contextmanager
def record_attention(unet: nn.Module, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
    """Let `recorder` see the queries and keys of the UNet's attention while the context is open."""
    handles = []
    try:
        for path, block in unet.named_modules():
            if isinstance(block, SpatialTransformer):
                names = [name for name in recorder.layers if name.startswith(f"{path}.")]
                note = partial(note_size, recorder, names)
                handles.append(block.register_forward_pre_hook(note))
        with listening(recorder, attention_modules(unet, CROSS) | attention_modules(unet, SELF)):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def note_size(
    recorder: AttentionRecorder, names: list[str], block: nn.Module, args: tuple[Any, ...]
) -> None:
    """Tell the recorder the size at which some layers work now: a patch may have shrunk their input."""
    size = (args[0].shape[-2], args[0].shape[-1])
    changed = [name for name in names if recorder.layers[name].size != size]
    if changed:
        sized = {name: replace(recorder.layers[name], size=size) for name in changed}
        recorder.layers = {**recorder.layers, **sized}
