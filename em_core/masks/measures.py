"""Measures of masks: overlap, area, agreement with a map, union."""

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor


def iou(first: Bool[Tensor, "*b h w"], second: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Return the intersection over union of each pair of masks; for two empty masks it is 1."""
    both = (first & second).flatten(-2).sum(dim=-1).float()
    either = (first | second).flatten(-2).sum(dim=-1).float()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))


def areas(masks: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Return the share of the picture that each mask covers, in 0..1."""
    return masks.float().mean(dim=(-2, -1))


def agreement(maps: Float[Tensor, "k h w"], masks: Bool[Tensor, "k h w"]) -> Float[Tensor, " k"]:
    """Return the correlation of each map with its mask, over the pixels: -1 to 1.

    Of all masks, the one that cuts the map at Otsu's threshold agrees most, whatever its size. It is
    0 for a mask that covers nothing or everything, and for a constant map.
    """
    # A Mac's device has no float64.
    x, m = maps.flatten(1).cpu().double(), masks.flatten(1).cpu().double()
    x, m = x - x.mean(dim=1, keepdim=True), m - m.mean(dim=1, keepdim=True)
    scale = x.norm(dim=1) * m.norm(dim=1)
    found = torch.where(scale > 1e-9, (x * m).sum(dim=1) / scale.clamp(min=1e-9), 0.0)
    return found.float().to(maps.device)


def union(masks: Float[Tensor, "b k h w"]) -> Float[Tensor, "b 1 h w"]:
    """Return the pixel-wise maximum over the concepts (the union in VCD Eq. 3)."""
    return reduce(masks, "b k h w -> b 1 h w", "max")
