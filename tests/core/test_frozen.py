"""Frozen layers give the gradient that PyTorch's own give, and keep less for it."""

import copy

import pytest
import torch
from small_models import sdxl
from torch import nn

from em_core.hosts.diffusers import DiffusersHost
from em_core.model.frozen import frozen_layers
from em_core.prompts import ConceptPrompt

PROMPT = ConceptPrompt.parse("a photo of <rex:dog> and <doll:doll> on grass")


def gradient(host: DiffusersHost) -> tuple[list[torch.Tensor], int]:
    """The vectors' gradient of a pass, and the bytes that it keeps besides the weights."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = torch.Generator().manual_seed(3)
    vectors = {
        name: {
            encoder: v.clone().requires_grad_()
            for encoder, v in host.initial_vectors("", 1, generator).items()
        }
        for name in PROMPT.names
    }
    Z = torch.randn(2, 4, 16, 16, generator=generator)
    conditioning = host.encode_prompts([PROMPT] * 2, vectors)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = host.predict(Z, torch.tensor([50.0, 700.0]), conditioning)
    weights = {p.untyped_storage().data_ptr() for p in host.unet.parameters()}
    held = sum(size for place, size in kept.items() if place not in weights)
    out.square().mean().backward()
    return [v.grad for of in vectors.values() for v in of.values()], held


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_less_is_kept_for_the_same_gradient(kind: str, host: DiffusersHost) -> None:
    if kind == "sdxl":
        host = DiffusersHost(sdxl())
    found, after = gradient(host)
    plain = copy.copy(host)
    plain.unet = copy.deepcopy(host.unet)
    for module in plain.unet.modules():
        module.__dict__.pop("forward", None)
    expected, before = gradient(plain)
    for a, b in zip(expected, found, strict=True):
        assert a.any() and torch.equal(a, b)
    assert after < 0.95 * before


def test_a_copy_acts_with_its_own_weights() -> None:
    """Learning on copies must not meet the weights that they were copied from."""
    with torch.no_grad():
        layer = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Linear(2, 2, bias=False))
        with frozen_layers(layer):
            twin = copy.deepcopy(layer)
            for p in twin.parameters():
                p.zero_()
            assert not twin(torch.ones(1, 1, 2, 2)).any()
        assert not any("forward" in module.__dict__ for module in layer.modules())


def test_weights_that_learn_get_their_gradient() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    with frozen_layers(layer):
        found = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
