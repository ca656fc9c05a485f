"""Turn the mean attention maps of one picture's concepts into masks (VCD, "Mask extraction")."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..pictures import Picture
from .crf import MaskRefiner, labels
from .guards import Guards
from .regions import Regions, belonging, centroids, placed
from .resizing import cut, resize
from .settings import MaskSettings
from .thresholds import binarise, min_max

Refine = Callable[[Float[Tensor, "k H W"], Float[Tensor, "k H W"]], Float[Tensor, "k H W"]]


@dataclass(frozen=True)
class Estimate:
    """Masks of one picture.

    Attributes:
        thresholded: B, the masks before refinement.
        probability: the refinement's marginals in 0..1, or B itself if there is no refinement.
        masks: M, the refined labels.
        anchors: the region that each concept was found in; None where regions are not looked for, or
            where there are too few.
    """

    thresholded: Bool[Tensor, "k H W"]
    probability: Float[Tensor, "k H W"]
    masks: Bool[Tensor, "k H W"]
    anchors: Bool[Tensor, "k H W"] | None = None

    def believed(self, guards: Guards) -> Bool[Tensor, " k"]:
        """Return which of the masks the guards believe."""
        return guards.accept(self.masks, self.thresholded, self.anchors)

    def weights(self, soft: bool) -> Float[Tensor, "k H W"]:
        """Return the M-step's weights for its losses: the marginals if `soft`, otherwise the labels."""
        return self.probability if soft else self.masks.float()


def masks_from_maps(
    maps: Float[Tensor, "k h w"],
    size: tuple[int, int],
    settings: MaskSettings,
    refine: Refine | None,
    regions: Regions | None = None,
) -> Estimate:
    """Resize, normalise, threshold and refine mean attention maps (VCD, "Mask extraction").

    With `regions`, each concept is first kept out of regions that belong to something else.
    """
    scaled = min_max(resize(maps, size, "map"), settings.peak)
    anchors = None
    if regions is not None:
        concepts = placed(min_max(maps, settings.peak), regions)
        scaled = scaled * resize(belonging(concepts, settings.share), size, "mask")
        own = concepts.anchors
        anchors = None if own is None else cut(resize(own, size, "mask"))
        scaled = scaled / scaled.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-8)
    thresholded = binarise(scaled, settings.threshold, settings.competition)
    if refine is None:
        return Estimate(thresholded, thresholded.float(), thresholded, anchors)
    probability = refine(thresholded.float(), scaled)
    masks = labels(probability, settings.crf is None or settings.crf.joint)
    return Estimate(thresholded, probability, masks, anchors)


def masks_among(
    there: Sequence[int],
    maps: Float[Tensor, "k h w"],
    size: tuple[int, int],
    settings: MaskSettings,
    refine: Refine | None,
    regions: Regions | None,
) -> Estimate:
    """Like :func:`masks_from_maps`, where only the concepts `there`, in order, compete for the picture.

    The masks of the others are empty.
    """
    if not there:
        nothing = torch.zeros(len(maps), *size, device=maps.device)
        return Estimate(nothing > 0, nothing, nothing > 0)
    index = torch.tensor(there, device=maps.device)
    if regions is not None:
        alike = tuple(tuple(there.index(i) for i in g if i in there) for g in regions.alike)
        told = None if regions.told is None else regions.told[index]
        regions = replace(regions, alike=alike, told=told)
    part = masks_from_maps(maps[index], size, settings, refine, regions)

    def at_place(x: Tensor) -> Tensor:
        return x.new_zeros(len(maps), *size).index_copy(0, index, x)

    anchors = None if part.anchors is None else at_place(part.anchors)
    return Estimate(
        at_place(part.thresholded), at_place(part.probability), at_place(part.masks), anchors
    )


def left_to_right(estimate: Estimate, alike: Sequence[Sequence[int]]) -> Estimate:
    """The estimate with the masks of concepts that are alike exchanged until they stand from left to right.

    By the centroids of the masks, of two at one x the upper first. The regions that masks are made from
    are of cells too coarse to tell which of two things that stand nearly above one another is the left one.

    Args:
        alike: concepts that share a map, as indices in the prompt's order; empty masks stay where they are.
    """
    order = list(range(len(estimate.masks)))
    there = estimate.masks.flatten(1).any(dim=1).tolist()
    x, y = centroids(estimate.masks.cpu().double())
    for group in alike:
        found = [index for index in group if there[index]]
        for index, mine in zip(found, sorted(found, key=lambda i: (x[i], y[i])), strict=True):
            order[index] = mine
    anchors = None if estimate.anchors is None else estimate.anchors[order]
    return Estimate(
        estimate.thresholded[order], estimate.probability[order], estimate.masks[order], anchors
    )


def make_refiner(picture: Picture, settings: MaskSettings) -> Refine | None:
    """Return the DenseCRF of one picture, or None if it is off."""
    return None if settings.crf is None else MaskRefiner(picture, settings.crf)
