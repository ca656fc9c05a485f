"""Turn attention maps into masks by normalisation, thresholds and competition."""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

Threshold = float | Literal["otsu"]
Masks = Float[Tensor, "k h w"]


def min_max(maps: Float[Tensor, "*b h w"], peak: float = 1.0) -> Float[Tensor, "*b h w"]:
    """Scale each map to 0..1; a constant map becomes 0.

    What lies above the quantile `peak` becomes 1.
    """
    low = maps.amin(dim=(-2, -1), keepdim=True)
    high = maps.amax(dim=(-2, -1), keepdim=True)
    if peak < 1:
        # The order statistic, since torch.quantile refuses maps of more than 2**24 pixels.
        flat = maps.flatten(-2)
        rank = max(1, math.ceil(peak * flat.shape[-1]))
        high = flat.kthvalue(rank, dim=-1).values[..., None, None]
    return ((maps - low) / (high - low).clamp(min=1e-8)).clamp(max=1)


def otsu(maps: Float[Tensor, "k h w"], bins: int = 64) -> Float[Tensor, " k"]:
    """Return Otsu's threshold for each map in 0..1: the split with the largest between-class variance.

    The candidates are the inner edges of `bins` equal bins (ViCo uses ten).
    """
    edges = torch.linspace(0, 1, bins + 1, device=maps.device)[1:-1]
    above = rearrange(maps, "k h w -> k 1 (h w)") > edges[:, None]
    values = rearrange(maps, "k h w -> k 1 (h w)")
    high = above.float().mean(dim=-1)
    sum_high = (values * above).mean(dim=-1)
    mean_high = sum_high / high.clamp(min=1e-8)
    mean_low = (values.mean(dim=-1) - sum_high) / (1 - high).clamp(min=1e-8)
    between = high * (1 - high) * (mean_high - mean_low).square()
    return edges[between.argmax(dim=-1)]


def threshold_maps(maps: Masks, threshold: Threshold) -> Bool[Tensor, "k h w"]:
    """Return B = A > tau for maps A in 0..1, with a fixed tau or Otsu's."""
    if threshold == "otsu":
        return maps > otsu(maps)[:, None, None]
    return maps > threshold


def compete(maps: Masks) -> Bool[Tensor, "k h w"]:
    """Give each pixel to the map that is highest there; ties go to the first."""
    winner = maps.argmax(dim=0)
    return winner == torch.arange(len(maps), device=maps.device)[:, None, None]


def binarise(maps: Masks, threshold: Threshold, competition: bool = True) -> Bool[Tensor, "k h w"]:
    """Turn maps in 0..1 into masks; with competition, a pixel over several thresholds has one owner."""
    above = threshold_maps(maps, threshold)
    return above & compete(maps.where(above, torch.zeros_like(maps))) if competition else above


def otsu_of_tenths(maps: Float[Tensor, "*b h w"]) -> Bool[Tensor, "*b h w"]:
    """Return ViCo's mask of each map (arXiv 2306.00971): Otsu's split among the thresholds 0, 0.1 .. 0.9.

    A map is scaled to 0..1 first. What equals the threshold is in the mask; all of a constant map is.
    """
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    scaled = ((maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)).flatten(-2)
    tenths = torch.arange(10, device=maps.device, dtype=maps.dtype) / 10
    above = (scaled[..., None, :] >= tenths[:, None]).to(maps.dtype)
    share = above.mean(dim=-1)
    sums = (scaled[..., None, :] * above).mean(dim=-1)
    mean_above = sums / share.clamp(min=1e-12)
    mean_below = (scaled.mean(dim=-1, keepdim=True) - sums) / (1 - share).clamp(min=1e-12)
    between = share * (1 - share) * (mean_above - mean_below).square()
    chosen = tenths[between.argmax(dim=-1)]
    return (scaled >= chosen[..., None]).reshape(maps.shape)
