"""Turn the mean attention maps of one picture's concepts into masks (VCD, "Mask extraction")."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ..pictures import Picture
from .crf import MaskRefiner, labels
from .regions import Regions, belonging
from .resizing import resize
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
    """

    thresholded: Bool[Tensor, "k H W"]
    probability: Float[Tensor, "k H W"]
    masks: Bool[Tensor, "k H W"]

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
    if regions is not None:
        scaled = scaled * resize(
            belonging(min_max(maps, settings.peak), regions, settings.share), size, "mask"
        )
        scaled = scaled / scaled.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-8)
    thresholded = binarise(scaled, settings.threshold, settings.competition)
    if refine is None:
        return Estimate(thresholded, thresholded.float(), thresholded)
    probability = refine(thresholded.float(), scaled)
    masks = labels(probability, settings.crf is None or settings.crf.joint)
    return Estimate(thresholded, probability, masks)


def make_refiner(picture: Picture, settings: MaskSettings) -> Refine | None:
    """Return the DenseCRF of one picture, or None if it is off."""
    return None if settings.crf is None else MaskRefiner(picture, settings.crf)
