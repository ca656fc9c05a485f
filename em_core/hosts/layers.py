"""The layers and weights of a diffusers pipeline that learn, by their paths, and learned ones in force."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..model.adapters import DIFF, DOWN, differences_applied, lora_applied
from ..settings import WeightKind

PROJECTION = "text_projection.weight"
ADAPTABLE = re.compile(r"attn.*\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
KEYS_AND_VALUES = re.compile(r"attn2\.to_[kv]\.weight$")
Modules = Sequence[tuple[str, nn.Module]]
"""The parts of a pipeline that can be learned, with the names that prefix their layers' names."""


def linear_layers(modules: Modules) -> dict[str, nn.Linear]:
    """Map paths to all linear layers."""
    return {
        f"{root}.{name}": layer
        for root, module in modules
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def adaptable_layers(modules: Modules) -> dict[str, nn.Linear]:
    """Map paths to the linear layers of attention."""
    layers = linear_layers(modules)
    return {path: layer for path, layer in layers.items() if ADAPTABLE.search(path)}


def named_weights(modules: Modules) -> dict[str, nn.Parameter]:
    """Map paths to all weights."""
    return {
        f"{root}.{name}": weight
        for root, module in modules
        for name, weight in module.named_parameters()
    }


def weights_of(
    kind: WeightKind, modules: Modules, tables: Collection[nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Map paths to the keys and values of cross-attention, or to all weights but those of the token tables
    and of the projection to pooled text."""
    named = named_weights(modules)
    if kind == "cross_attention":
        return {name: weight for name, weight in named.items() if KEYS_AND_VALUES.search(name)}
    left_out = {id(table) for table in tables}
    return {
        name: weight
        for name, weight in named.items()
        if id(weight) not in left_out and not name.endswith(PROJECTION)
    }


@contextmanager
def weights_applied(
    weights: Mapping[str, Tensor],
    lora_scale: float,
    device: torch.device,
    linear: Mapping[str, nn.Linear],
    full: Mapping[str, nn.Parameter],
) -> Iterator[None]:
    """Apply a learned LoRA and differences of weights while the context is open."""
    lora = {name: weight.to(device) for name, weight in weights.items() if not name.endswith(DIFF)}
    diffs = {name: weight for name, weight in weights.items() if name.endswith(DIFF)}
    with ExitStack() as stack:
        if any(name.endswith(DOWN) for name in lora):
            stack.enter_context(lora_applied(linear, lora, lora_scale))
        if diffs:
            stack.enter_context(differences_applied(full, diffs))
        yield
