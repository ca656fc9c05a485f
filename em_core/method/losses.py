"""The losses of the M-step: VCD Eq. 1, 3 and 4, ViCo's end-of-text regulariser."""

from einops import reduce
from jaxtyping import Float
from torch import Tensor

from ..settings import Normalisation


def diffusion_loss(
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """VCD Eq. 1, mean over all elements; `weight` is each sample's, from the noise schedule."""
    return (weight[:, None, None, None] * (prediction - target).square()).mean()


def masked_diffusion_loss(
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    mask: Float[Tensor, "b 1 h w"],
    weight: Float[Tensor, " b"],
    normalisation: Normalisation = "area",
) -> Float[Tensor, ""]:
    """VCD Eq. 3: error of the prediction under the union of the concepts' masks (values 0..1), each
    sample's times its `weight` from the noise schedule.

    "mean" divides by all elements, as Break-a-Scene does, so that small masks count little;
    "area" divides each sample by its mask's own area.
    """
    error = weight[:, None, None, None] * (mask * (prediction - target)).square()
    if normalisation == "mean":
        return error.mean()
    area = reduce(mask.square(), "b 1 h w -> b", "sum").clamp(min=1.0)
    return (reduce(error, "b c h w -> b", "sum") / (area * prediction.shape[1])).mean()


def max_normalised(maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """C = A / max(A) with gradient through the maximum, as Break-a-Scene does."""
    return maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=1e-8)


def attention_loss(
    maps: Float[Tensor, "b k h w"],
    masks: Float[Tensor, "b k h w"],
    present: Float[Tensor, "b k"],
) -> Float[Tensor, ""]:
    """VCD Eq. 4: squared distance of C = A / max(A) to the mask.

    Mean over pixels and samples, sum over the concepts that are `present` (1) in a sample.
    """
    distance = reduce((max_normalised(maps) - masks).square(), "b k h w -> b k", "mean")
    return (distance * present).sum(dim=1).mean()


def end_of_text_regulariser(
    maps: Float[Tensor, "b k h w"],
    end_map: Float[Tensor, "b 1 h w"],
    present: Float[Tensor, "b k"],
) -> Float[Tensor, ""]:
    """ViCo's regulariser: a concept's normalised map stays near that of the end-of-text token."""
    anchor = max_normalised(end_map).detach().expand_as(maps)
    return attention_loss(maps, anchor, present)
