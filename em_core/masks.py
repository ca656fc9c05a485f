"""From attention maps to masks: normalisation, thresholds, competition, guards, resizing."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

Threshold = float | Literal["otsu"]
Masks = Float[Tensor, "k h w"]


def min_max(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Scale each map to 0..1; a constant map becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return (maps - low) / span.clamp(min=1e-8)


def max_scaled(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Divide each map by its maximum."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-8)


def otsu(maps: Float[Tensor, "k h w"], bins: int = 64) -> Float[Tensor, " k"]:
    """Otsu's threshold of each map in 0..1: the split with the largest between-class variance.

    Candidates are the inner edges of `bins` equal bins (ViCo uses ten).
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
    """B = A > tau on maps in 0..1, tau fixed or Otsu's."""
    if threshold == "otsu":
        return maps > otsu(maps)[:, None, None]
    return maps > threshold


def compete(maps: Masks) -> Bool[Tensor, "k h w"]:
    """Each pixel to the map that claims it most; ties go to the first."""
    winner = maps.argmax(dim=0)
    return winner == torch.arange(len(maps), device=maps.device)[:, None, None]


def binarise(maps: Masks, threshold: Threshold, competition: bool = True) -> Bool[Tensor, "k h w"]:
    """Masks of maps in 0..1; with competition a pixel above several thresholds has one owner."""
    above = threshold_maps(maps, threshold)
    return above & compete(maps.where(above, torch.zeros_like(maps))) if competition else above


def iou(a: Bool[Tensor, "*b h w"], b: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Intersection over union of each pair of masks; two empty masks agree (1)."""
    both = (a & b).flatten(-2).sum(dim=-1).float()
    either = (a | b).flatten(-2).sum(dim=-1).float()
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either))


def areas(masks: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Share of the picture that each mask covers, 0..1."""
    return masks.float().mean(dim=(-2, -1))


def contrast(maps: Float[Tensor, "k h w"], masks: Bool[Tensor, "k h w"]) -> Float[Tensor, " k"]:
    """Mean of each map inside its mask less the mean outside; 0 for a mask of nothing or everything."""
    inside = masks.float()
    outside = 1 - inside
    area_in, area_out = (reduce(x, "k h w -> k", "sum") for x in (inside, outside))
    mean_in = reduce(maps * inside, "k h w -> k", "sum") / area_in.clamp(min=1)
    mean_out = reduce(maps * outside, "k h w -> k", "sum") / area_out.clamp(min=1)
    return (mean_in - mean_out) * (area_in > 0) * (area_out > 0)


def resize_masks(
    masks: Float[Tensor, "k _h _w"], size: tuple[int, int], *, soft: bool = True
) -> Float[Tensor, "k h w"]:
    """Area resize where it shrinks, bilinear where it grows; `soft=False` then cuts at 0.5."""
    if masks.shape[-2:] != size:
        mode = "area" if masks.shape[-2] >= size[0] and masks.shape[-1] >= size[1] else "bilinear"
        align = None if mode == "area" else False
        masks = F.interpolate(masks[None].float(), size=size, mode=mode, align_corners=align)[0]
    return masks if soft else (masks > 0.5).float()


def union(masks: Float[Tensor, "b k h w"]) -> Float[Tensor, "b 1 h w"]:
    """Pixel-wise maximum over the concepts (the union of VCD Eq. 3)."""
    return reduce(masks, "b k h w -> b 1 h w", "max")


@dataclass(frozen=True)
class Guards:
    """When an E-step's mask is not believed and the previous one stays (method: CutLER's rule, own limits).

    Attributes:
        min_agreement: least IoU of the refined mask with the thresholded map it came from.
        min_area, max_area: limits of the share of the picture that a mask may cover.
    """

    min_agreement: float = 0.5
    min_area: float = 0.005
    max_area: float = 0.95

    def accept(
        self, refined: Bool[Tensor, "k h w"], thresholded: Bool[Tensor, "k h w"]
    ) -> Bool[Tensor, " k"]:
        """Which of the k refined masks are to be believed."""
        area = areas(refined)
        agree = iou(refined, thresholded) >= self.min_agreement
        return agree & (area >= self.min_area) & (area <= self.max_area)
