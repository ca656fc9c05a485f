"""Checks that a new mask has to pass."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from .measures import areas, iou


@dataclass(frozen=True)
class Guards:
    """When an E-step's mask is not believed, so that the previous one stays.

    The rule is CutLER's; the limits are our own.

    Attributes:
        min_agreement: smallest IoU of the refined mask and the thresholded map it came from.
        min_anchored: smallest IoU of the refined mask and the concept's region that is believed instead:
            a map that bleeds over a thing's edge agrees little with the mask, although that is right.
        min_area, max_area: smallest and largest share of the picture that a mask may cover.
    """

    min_agreement: float = 0.5
    min_anchored: float = 0.4
    min_area: float = 0.005
    max_area: float = 0.95

    def accept(
        self,
        refined: Bool[Tensor, "k h w"],
        thresholded: Bool[Tensor, "k h w"],
        anchors: Bool[Tensor, "k h w"] | None = None,
    ) -> Bool[Tensor, " k"]:
        """Return which of the k refined masks to believe.

        Args:
            anchors: the region that each concept was found in, where regions were looked for.
        """
        area = areas(refined)
        agree = iou(refined, thresholded) >= self.min_agreement
        if anchors is not None:
            agree |= iou(refined, anchors) >= self.min_anchored
        return agree & (area >= self.min_area) & (area <= self.max_area)
