"""Training and applying model weights without leaving a trace: a LoRA by hooks, others by exchange."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError

DOWN, UP, DIFF = ".lora_down", ".lora_up", ".diff"


@dataclass(frozen=True)
class TrainableParts:
    """Parts of a model that can be learned.

    Attributes:
        parameters: name -> what an optimizer changes.
        learned: gives what a concept file keeps of them: LoRA factors, or `<path>.diff` against
            the model's own weights.
        untouched: gives a context in which the model acts as if nothing had been learned, for passes
            without gradients.
    """

    parameters: Mapping[str, nn.Parameter]
    learned: Callable[[], dict[str, Tensor]]
    untouched: Callable[[], AbstractContextManager[None]]


@contextmanager
def trainable_lora(
    layers: Mapping[str, nn.Linear],
    values: Mapping[str, Tensor],
    generator: torch.Generator,
    rank: int,
    alpha: float,
) -> Iterator[TrainableParts]:
    """A LoRA on `layers` that acts and can be learned while the context is open."""
    parameters = (
        {name: nn.Parameter(x.detach().clone()) for name, x in values.items()}
        if values
        else init_lora(layers, rank, generator)
    )
    nothing = {name: torch.zeros_like(p) for name, p in parameters.items() if name.endswith(UP)}
    with lora_applied(layers, parameters, alpha / rank):
        yield TrainableParts(
            parameters,
            lambda: {name: p.detach().clone() for name, p in parameters.items()},
            partial(replaced, parameters, nothing),
        )


@contextmanager
def trainable_weights(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[TrainableParts]:
    """The model's own weights, learned in the tensors of `values` or in copies of what they are.

    `values` are not copied, since they may fill much of the memory.

    Raises:
        UserError: they are too coarse for the small steps of training.
    """
    coarse = sorted({str(p.dtype) for p in parameters.values() if p.dtype != torch.float32})
    if coarse:
        raise UserError(
            f"Whole weights are learned in float32, got {', '.join(coarse)}. Load the model in "
            "float32, or learn a LoRA."
        )
    learning = {
        name: values[name].detach().to(p.device) if name in values else p.detach().clone()
        for name, p in parameters.items()
    }
    with exchanged(parameters, learning) as own:
        for p in parameters.values():
            p.requires_grad_(True)
        yield TrainableParts(
            parameters,
            lambda: {n + DIFF: p.detach() - own[n] for n, p in parameters.items()},
            partial(replaced, parameters, own),
        )


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
    """Forward hook: W x + scale * up down x.

    The two small factors are cast to the type of x, since x itself would be kept for the backward
    pass in the wider type. Their own values, and what an optimizer makes of them, stay as wide.
    """
    x = args[0]
    low = x @ down.to(x.dtype).T @ up.to(x.dtype).T
    return output + (scale * low).to(output.dtype)


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
def exchanged(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Let the parameters hold other tensors while the context is open; yields their own.

    Their very own tensors come back when it closes, and `values` hold what became of them.
    """
    own = {name: p.data for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    with replaced(parameters, {name: values[name] for name in parameters}):
        try:
            yield own
        finally:
            for name, p in parameters.items():
                p.grad = None
                p.requires_grad_(flags[name])


@contextmanager
def replaced(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let some parameters hold other values while the context is open, with what they have learned and
    their gradients kept. No pass whose backward is still to come may be open."""
    learned = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in learned.items():
            parameters[name].data = value


@contextmanager
def differences_applied(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add `<path>.diff` tensors to the weights while the context is open.

    Weights that rest in 8 bits are in the differences' type meanwhile, which would else be lost in them.
    """
    touched = {key.removesuffix(DIFF): parameters[key.removesuffix(DIFF)] for key in tensors}
    changed = {name: with_difference(p, tensors[name + DIFF]) for name, p in touched.items()}
    with exchanged(touched, changed):
        yield


def with_difference(weight: Tensor, difference: Tensor) -> Tensor:
    """Their sum, in the weight's type unless that has 8 bits."""
    dtype = difference.dtype if weight.dtype.itemsize == 1 else weight.dtype
    return weight.detach().to(dtype) + difference.to(weight.device, dtype)
