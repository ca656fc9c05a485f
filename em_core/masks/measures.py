"""Measures of masks: agreement, area, contrast and union."""

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


def contrast(maps: Float[Tensor, "k h w"], masks: Bool[Tensor, "k h w"]) -> Float[Tensor, " k"]:
    """Return each map's mean inside its mask minus its mean outside.

    It is 0 for a mask that covers nothing or everything.
    """
    inside = masks.float()
    outside = 1 - inside
    area_in, area_out = (reduce(part, "k h w -> k", "sum") for part in (inside, outside))
    mean_in = reduce(maps * inside, "k h w -> k", "sum") / area_in.clamp(min=1)
    mean_out = reduce(maps * outside, "k h w -> k", "sum") / area_out.clamp(min=1)
    return (mean_in - mean_out) * (area_in > 0) * (area_out > 0)


def union(masks: Float[Tensor, "b k h w"]) -> Float[Tensor, "b 1 h w"]:
    """Return the pixel-wise maximum over the concepts (the union in VCD Eq. 3)."""
    return reduce(masks, "b k h w -> b 1 h w", "max")
