"""Refinement of a picture's masks with its DenseCRF."""

from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ...errors import UserError
from ..resizing import cut, resize
from . import pydensecrf_backend
from .confidence import confident_masks
from .local_colour import LocalColour
from .mean_field import DenseCRF, appearance_filter, gaussian_filter
from .memory import require_memory
from .settings import LOCAL_COLOUR, CRFSettings


class MaskRefiner:
    """Refines masks of one picture. The lattices are built on first use and kept.

    Calls are independent of each other, so one refiner can serve every E-step with any number of masks.
    """

    def __init__(self, image: Shaped[Tensor, "..."], settings: CRFSettings = LOCAL_COLOUR):
        """
        Args:
            image: RGB of shape (3, h, w), float in 0..1 or uint8; colours are rounded to 8 bits.
            settings: parameters of the kernels, the unary and the solver.

        Raises:
            UserError: the image is not RGB, has NaN or values out of range, or is too large for memory.
        """
        self.settings = settings
        self.device = image.device
        # Accelerators other than CUDA lack some of the operations, so the CPU is used instead.
        image = colours(image if image.device.type in ("cpu", "cuda") else image.cpu())
        self.size = (int(image.shape[-2]), int(image.shape[-1]))
        self.image = shrink(image, settings.working_size)
        require_memory(self.image.shape[-2] * self.image.shape[-1], self.image.device)

    @cached_property
    def crf(self) -> DenseCRF:
        """The CRF of the picture at the working size."""
        appearance = self.colour.alike if self.settings.colour_weight else None
        return DenseCRF.of_image(self.image, self.settings, appearance)

    @cached_property
    def colour(self) -> LocalColour:
        """The picture's local colour models at the working size."""
        height, width = self.image.shape[-2:]
        theta = self.settings.bilateral_theta_xy * self.settings.scale(height, width)
        near = gaussian_filter(height, width, theta, self.image.device)
        return LocalColour(appearance_filter(self.image, self.settings), near)

    def __call__(
        self, masks: Shaped[Tensor, "..."], maps: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "k h w"]:
        """Foreground marginals of k masks, 0..1, at the size of the picture.

        Args:
            masks: one or more, of shape (k, hm, wm), bool or in 0..1. Masks of another size are
                resized to the picture's.
            maps: the soft maps that the masks were made from, in 0..1, as many as masks. They say how
                sure a mask is of each pixel, if the settings use maps.

        Raises:
            UserError: there are no masks, masks or maps have NaN or values outside 0..1, their numbers
                differ, or the backend is not installed.
        """
        height, width = self.image.shape[-2:]
        resized = resize(check_masks(masks).to(self.image), (height, width), "mask")
        if maps is not None and self.settings.use_maps:
            maps = check_masks(maps, "maps").to(self.image)
            if len(maps) != len(masks):
                raise UserError(f"Bad maps. Expected one per mask ({len(masks)}), got {len(maps)}.")
            resized = confident_masks(resized, resize(maps, (height, width), "map"))
        solve = self.solve_joint if self.settings.joint else self.solve_alone
        with torch.no_grad(), torch.autocast(self.image.device.type, enabled=False):
            return resize(solve(resized), self.size, "mask").to(self.device)

    def solve_joint(self, masks: Float[Tensor, "k h w"]) -> Float[Tensor, "k h w"]:
        """Solve one CRF with a label for each mask and a last one for the background.

        Colour models are learned from the softmax of the unary at first, then from the marginals.
        """
        unary = joint_unary(masks, self.settings.unary_strength)
        if not self.settings.colour_weight:
            return self.infer(unary)[:-1]
        Q = torch.softmax(-unary, dim=0)
        for _ in range(self.settings.colour_rounds):
            Q = self.infer(unary - self.settings.colour_weight * self.evidence(Q))
        return Q[:-1]

    def evidence(self, Q: Float[Tensor, "labels h w"]) -> Float[Tensor, "labels h w"]:
        """What the local colour models say for each label."""
        flat = self.colour.evidence(rearrange(Q, "l h w -> l (h w)"))
        return rearrange(flat, "l (h w) -> l h w", h=Q.shape[-2])

    def solve_alone(self, masks: Float[Tensor, "k h w"]) -> Float[Tensor, "k h w"]:
        """Solve one binary CRF for each mask."""
        if self.settings.backend == "pydensecrf" or self.settings.colour_weight:
            return torch.cat([self.solve_joint(mask[None]) for mask in masks])
        logits = rearrange(self.settings.unary_strength * (2 * masks - 1), "k h w -> k (h w)")
        Q = self.crf.infer_alone(logits, self.settings.iterations)
        return rearrange(Q, "k (h w) -> k h w", h=masks.shape[-2])

    def infer(self, unary: Float[Tensor, "labels h w"]) -> Float[Tensor, "labels h w"]:
        """Marginals for unary energies given at the working size."""
        if self.settings.backend == "pydensecrf":
            return pydensecrf_backend.infer(unary, self.image, self.settings)
        Q = self.crf.infer(rearrange(unary, "l h w -> l (h w)"), self.settings.iterations)
        return rearrange(Q, "l (h w) -> l h w", h=unary.shape[-2])


def labels(marginals: Float[Tensor, "k h w"], joint: bool = True) -> Bool[Tensor, "k h w"]:
    """Turn marginals into k masks by taking the most probable label of each pixel.

    If solved jointly, a pixel belongs to its most probable mask, or to none if the background, which
    has the remaining probability, is at least as probable. Otherwise it belongs to every mask with a
    probability over one half.
    """
    if not joint:
        return cut(marginals)
    background = 1 - marginals.sum(dim=0, keepdim=True)
    winner = torch.cat([background, marginals]).argmax(dim=0)
    return winner == torch.arange(1, len(marginals) + 1, device=winner.device)[:, None, None]


def joint_unary(masks: Float[Tensor, "k h w"], strength: float) -> Float[Tensor, "labels h w"]:
    """-log softmax(strength * labels), where the labels are the masks and, last, the background.

    The background is 1 minus the maximum of the masks. With strength 1 and one binary mask, this is
    CutLER's unary: probabilities of 0.731 and 0.269.
    """
    background = 1 - masks.amax(dim=0, keepdim=True)
    return -torch.log_softmax(strength * torch.cat([masks, background]), dim=0)


def colours(image: Shaped[Tensor, "..."]) -> Float[Tensor, "3 h w"]:
    """Colours as whole numbers 0..255 in float32, from floats in 0..1 or uint8."""
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise UserError(
            f"Bad image. Expected RGB of shape (3, height, width), got {tuple(image.shape)}."
        )
    if image.dtype == torch.uint8:
        return image.float()
    if not image.is_floating_point():
        raise UserError(f"Bad image. Expected floats in 0..1 or uint8, got {image.dtype}.")
    require_unit_range("image", image)
    return (image.detach().float() * 255).round_()


def check_masks(masks: Shaped[Tensor, "..."], what: str = "masks") -> Shaped[Tensor, "k hm wm"]:
    """The masks (or maps) as floats, after checking their shape and values."""
    if masks.ndim != 3 or masks.numel() == 0:
        raise UserError(
            f"Bad {what}. Expected at least one, of shape ({what}, height, width), got {tuple(masks.shape)}."
        )
    masks = masks.detach().float()
    require_unit_range(what, masks)
    return masks


def require_unit_range(what: str, values: Tensor) -> None:
    """Raise a UserError unless all values lie in 0..1."""
    low, high = (float(bound) for bound in torch.aminmax(values))
    if low != low:
        raise UserError(f"Bad {what}. Expected values in 0..1, got NaN.")
    if low < 0 or high > 1:
        raise UserError(
            f"Bad {what}. Expected values in 0..1, got {low:g} to {high:g}. Scale them first."
        )


def shrink(image: Float[Tensor, "3 h w"], longest: int | None) -> Float[Tensor, "3 h2 w2"]:
    """The image in 0..255 with its longer side at most `longest`, colours rounded to whole numbers."""
    height, width = image.shape[-2:]
    if longest is None or max(height, width) <= longest:
        return image
    factor = longest / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return (resize(image / 255, size, "picture") * 255).round()
