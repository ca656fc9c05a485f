"""Layers with frozen weights, which keep for the backward pass only what a gradient of their input needs.

PyTorch's convolution keeps its input even where its weight has no gradient. A weight that is stored in
a narrower type than it acts in is cast in every pass, and autograd keeps the wide copy: for a whole
text encoder or UNet, more than its activations. Here neither is kept; the weight is cast again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


class FrozenLinear(torch.autograd.Function):
    """x W^T + b for W in any type; saves nothing of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.to(grad.dtype), None, None


class FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight has no gradient; saves no more than its input's shape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        ctx.weight, ctx.shape, ctx.options = weight, x.shape, options
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight = ctx.weight.to(grad.dtype)
        return conv2d_input(ctx.shape, weight, grad, *ctx.options), None, None, None


def acts_alone(module: Any, x: Tensor) -> bool:
    """Whether a layer is no more than its weight and bias: frozen, on x's device, without functions
    that a host has put on them."""
    own = [p for p in (module.weight, module.bias) if p is not None]
    functions = getattr(module, "weight_function", None) or getattr(module, "bias_function", None)
    plain = not functions and all(p.device == x.device and not p.requires_grad for p in own)
    return plain and torch.is_grad_enabled() and x.requires_grad


def in_type_of(x: Tensor, module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a layer in the number type of x."""
    return module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)


def linear(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The `forward` of a linear layer; where nothing would be saved, that of its class, but for torch's
    own, which acts in no other type than its weight's."""
    own = type(module).forward
    if args or kwargs or module.weight.dtype == x.dtype:
        return own(module, x, *args, **kwargs)
    if acts_alone(module, x):
        return FrozenLinear.apply(x, module.weight, module.bias)
    return F.linear(x, *in_type_of(x, module)) if own is nn.Linear.forward else own(module, x)


def convolution(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The `forward` of a convolution, in the same way."""
    own = type(module).forward
    options = (module.stride, module.padding, module.dilation, module.groups)
    if not args and not kwargs and acts_alone(module, x):
        return FrozenConvolution.apply(x, module.weight, module.bias, options)
    if args or kwargs or module.weight.dtype == x.dtype or own is not nn.Conv2d.forward:
        return own(module, x, *args, **kwargs)
    return F.conv2d(x, *in_type_of(x, module), *options)


@contextmanager
def frozen_layers(*models: nn.Module) -> Iterator[None]:
    """Let the linear layers and convolutions of models save no more than they need while the context
    is open. Layers whose `forward` somebody else has set stay as they are."""
    changed: list[nn.Module] = []
    try:
        changed += freeze_layers(*models)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def freeze_layers(*models: nn.Module) -> list[nn.Module]:
    """Let the layers of models save no more than they need from now on, and return them."""
    changed: list[nn.Module] = []
    for module in (module for model in models for module in model.modules()):
        if "forward" in module.__dict__:
            continue
        if isinstance(module, nn.Linear):
            module.forward = MethodType(linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
            module.forward = MethodType(convolution, module)  # type: ignore[method-assign]
        else:
            continue
        changed.append(module)
    return changed
