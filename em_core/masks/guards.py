"""When a new mask is not believed."""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from .measures import areas, iou


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
