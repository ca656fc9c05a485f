"""Training and applying model weights without leaving a trace: LoRA by hooks, others by exact restore."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

DOWN, UP, DIFF = ".lora_down", ".lora_up", ".diff"


def init_lora(
    layers: Mapping[str, nn.Linear], rank: int, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """`<path>.lora_down` [rank, in] Kaiming-uniform, `<path>.lora_up` [out, rank] zero (Hu et al. 2021)."""
    parameters = {}
    for path, layer in layers.items():
        bound = layer.in_features**-0.5
        down = (torch.rand(rank, layer.in_features, generator=generator) * 2 - 1) * bound
        device = layer.weight.device
        parameters[path + DOWN] = nn.Parameter(down.to(device))
        parameters[path + UP] = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
    return parameters


def add_lora(
    down: Float[Tensor, "r i"],
    up: Float[Tensor, "o r"],
    scale: float,
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """Forward hook: W x + scale * up down x."""
    x = args[0].to(down.dtype)
    return output + (scale * (x @ down.T @ up.T)).to(output.dtype)


@contextmanager
def lora_applied(
    layers: Mapping[str, nn.Linear], tensors: Mapping[str, Tensor], scale: float
) -> Iterator[None]:
    """Add the LoRA `tensors` to `layers` while the context is open; the weights are not touched.

    Raises:
        KeyError: a LoRA path names no layer.
    """
    handles = []
    try:
        for key in tensors:
            if key.endswith(DOWN):
                path = key.removesuffix(DOWN)
                hook = partial(add_lora, tensors[key], tensors[path + UP], scale)
                handles.append(layers[path].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Give the parameters' values and flags back exactly when the context closes; yields the originals."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])
                p.requires_grad_(flags[name])
                p.grad = None


def differences(
    parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`<path>.diff` = weight now - weight before."""
    return {name + DIFF: p.detach() - before[name] for name, p in parameters.items()}


@contextmanager
def differences_applied(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], strength: float = 1.0
) -> Iterator[None]:
    """Add `<path>.diff` tensors to the weights while the context is open."""
    touched = {key.removesuffix(DIFF): parameters[key.removesuffix(DIFF)] for key in tensors}
    with restored(touched):
        with torch.no_grad():
            for name, p in touched.items():
                p.add_(tensors[name + DIFF].to(p), alpha=strength)
        yield
