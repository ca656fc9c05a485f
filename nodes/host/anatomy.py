"""What the memory of a run depends on, read off ComfyUI's modules."""

from collections.abc import Iterator
from typing import Any

from comfy.clip_model import ACTIVATIONS
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, Upsample
from torch import nn

from ...em_core.model.anatomy import (
    Anatomy,
    Autoencoder,
    Resampling,
    Residual,
    Stage,
    TextEncoder,
    Transformer,
)
from .families import GraphModels, text_encoders
from .layers import adaptable_layers, crossing_weights


def anatomy(models: GraphModels) -> Anatomy:
    """Return the anatomy of a graph's MODEL and CLIP."""
    unet, clip = models.model.model.diffusion_model, models.clip
    sizes = [(weight.ndim > 1, weight.numel()) for weight in unet.parameters()]
    layers = adaptable_layers(unet, clip.cond_stage_model).values()
    return Anatomy(
        stages=tuple(stages(unet)),
        matrices=sum(count for is_matrix, count in sizes if is_matrix),
        small=sum(count for is_matrix, count in sizes if not is_matrix),
        text=tuple(text_encoder(part) for part in text_encoders(clip).values()),
        lora_width=sum(layer.in_features + layer.out_features for layer in layers),
        crossing=sum(weight.numel() for weight in crossing_weights(unet).values()),
        autoencoder=autoencoder(models),
    )


def autoencoder(models: GraphModels) -> Autoencoder:
    """Return the VAE's description."""
    model = models.vae.first_stage_model
    weights = list(model.parameters())
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return Autoencoder(
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        channels=first.out_channels,
        compute=weights[0].element_size(),
        factor=models.factor,
    )


def stages(unet: Any) -> Iterator[Stage]:
    """Yield a UNet's stages in the order in which they run."""
    level = 0
    groups = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    for index, group in enumerate(groups):
        parts = [module for module in group if known(module)]
        for module in parts:
            skipped = index < len(unet.input_blocks) and module is parts[-1]
            if isinstance(module, Upsample):
                level -= 1
            yield stage(module, level, skipped)
            if isinstance(module, Downsample):
                level += 1


def known(module: nn.Module) -> bool:
    return isinstance(module, (ResBlock, SpatialTransformer, Downsample, Upsample))


def stage(module: Any, level: int, skipped: bool) -> Stage:
    """Return one module's description."""
    if isinstance(module, ResBlock):
        return Residual(module.channels, module.out_channels, level, skipped)
    if isinstance(module, SpatialTransformer):
        block = module.transformer_blocks[0]
        return Transformer(
            channels=block.attn1.to_q.in_features,
            depth=len(module.transformer_blocks),
            heads=block.n_heads,
            text_width=block.attn2.to_k.in_features,
            level=level,
            skipped=skipped,
        )
    return Resampling(module.channels, level, skipped)


def text_encoder(part: Any) -> TextEncoder:
    """Return one text encoder's description."""
    weights = list(part.parameters())
    layers = part.transformer.text_model.encoder.layers
    return TextEncoder(
        width=part.transformer.get_input_embeddings().weight.shape[1],
        layers=len(layers),
        bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        weights=sum(weight.numel() for weight in weights),
        quick=layers[0].mlp.activation is ACTIVATIONS["quick_gelu"],
    )
