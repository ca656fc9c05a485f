"""What the memory of a run depends on, read off a pipeline's modules."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..model.anatomy import (
    Anatomy,
    Autoencoder,
    Resampling,
    Residual,
    Stage,
    TextEncoder,
    Transformer,
)
from .diffusers import DiffusersHost
from .text import TextEncoder as Encoder


def anatomy(host: DiffusersHost, dtype: torch.dtype) -> Anatomy:
    """Return the anatomy of a host's pipeline, with text encoders and VAE that rest in a number type."""
    sizes = [(weight.ndim > 1, weight.numel()) for weight in host.unet.parameters()]
    layers = host.adaptable_layers().values()
    return Anatomy(
        stages=tuple(stages(host.unet)),
        matrices=sum(count for is_matrix, count in sizes if is_matrix),
        small=sum(count for is_matrix, count in sizes if not is_matrix),
        text=tuple(text_encoder(encoder, dtype) for encoder in host.encoders),
        lora_width=sum(layer.in_features + layer.out_features for layer in layers),
        crossing=sum(weight.numel() for weight in host.weights("cross_attention").values()),
        autoencoder=autoencoder(host, dtype),
    )


def autoencoder(host: DiffusersHost, dtype: torch.dtype) -> Autoencoder:
    """Return the VAE's description; one that float16 is too narrow for encodes in float32."""
    narrow = dtype == torch.float16 and host.vae.config.force_upcast
    size = torch.float32.itemsize if narrow else dtype.itemsize
    return Autoencoder(
        bytes=sum(weight.numel() for weight in host.vae.parameters()) * size,
        channels=host.vae.config.block_out_channels[0],
        compute=size,
        factor=host.factor,
    )


def stages(unet: Any) -> Iterator[Stage]:
    """Yield a UNet's stages in the order in which they run."""
    level = 0
    for block in unet.down_blocks:
        for layer in interleaved(block):
            yield from one_layer(layer, level, skipped=True)
        for halving in block.downsamplers or ():
            yield Resampling(halving.channels, level, skipped=True)
            level += 1
    middle = unet.mid_block
    yield from one_layer([middle.resnets[0]], level, skipped=False)
    for attention, residual in zip(middle.attentions, middle.resnets[1:], strict=True):
        yield from one_layer([attention], level, skipped=False)
        yield from one_layer([residual], level, skipped=False)
    for block in unet.up_blocks:
        for layer in interleaved(block):
            yield from one_layer(layer, level, skipped=False)
        for doubling in block.upsamplers or ():
            level -= 1
            yield Resampling(doubling.channels, level)


def interleaved(block: Any) -> Iterator[list[nn.Module]]:
    """Yield the modules of each layer of a block: a residual block and, where there is one, a transformer."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for residual, attention in zip(block.resnets, attentions, strict=True):
        yield [module for module in (residual, attention) if module is not None]


def one_layer(modules: list[Any], level: int, skipped: bool) -> Iterator[Stage]:
    """Yield the descriptions of a layer's modules, of which the last one's output may be kept."""
    for module in modules:
        kept = skipped and module is modules[-1]
        if hasattr(module, "transformer_blocks"):
            block = module.transformer_blocks[0]
            yield Transformer(
                channels=block.attn1.to_q.in_features,
                depth=len(module.transformer_blocks),
                heads=block.attn1.heads,
                text_width=block.attn2.to_k.in_features,
                level=level,
                skipped=kept,
            )
        else:
            yield Residual(module.in_channels, module.out_channels, level, kept)


def text_encoder(encoder: Encoder, dtype: torch.dtype) -> TextEncoder:
    """Return one text encoder's description."""
    weights = list(encoder.model.parameters())
    config = encoder.model.config
    return TextEncoder(
        width=encoder.width,
        layers=config.num_hidden_layers,
        bytes=sum(weight.numel() for weight in weights) * dtype.itemsize,
        weights=sum(weight.numel() for weight in weights),
        quick=config.hidden_act == "quick_gelu",
    )
