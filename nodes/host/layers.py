"""The layers and weights of ComfyUI's models that can be learned, by path."""

import re
from collections.abc import Mapping

from torch import nn

UNET = "diffusion_model"
ADAPTABLE = re.compile(r"attn[12]\.(to_[qkv]|to_out\.0)$|self_attn\.([qkv]|out)_proj$")
CROSS_ATTENTION = re.compile(r"attn2\.to_[kv]\.weight$")
NO_PART = re.compile(r"token_embedding\.weight$|logit_scale$|text_projection\.weight$")


def adaptable_layers(unet: nn.Module, encoders: nn.Module) -> dict[str, nn.Linear]:
    """Map paths to the linear layers that a LoRA acts on: the attention of UNet and text encoders."""
    modules = {f"{UNET}.{name}": module for name, module in unet.named_modules()}
    modules |= dict(encoders.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and ADAPTABLE.search(name)
    }


def named_weights(unet: nn.Module, encoders: nn.Module) -> dict[str, nn.Parameter]:
    """Map paths to all weights of the UNet and the text encoders."""
    named = {f"{UNET}.{name}": weight for name, weight in unet.named_parameters()}
    return named | dict(encoders.named_parameters())


def crossing_weights(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Map paths to the keys and values of cross-attention."""
    named = {f"{UNET}.{name}": weight for name, weight in unet.named_parameters()}
    return {name: weight for name, weight in named.items() if CROSS_ATTENTION.search(name)}


def taking_part(named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Of named weights, those that have any effect on a prediction."""
    return {name: weight for name, weight in named.items() if not NO_PART.search(name)}
