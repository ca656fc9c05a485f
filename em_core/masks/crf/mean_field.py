"""The fully connected CRF with Potts labels, solved by mean field."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .features import bilateral_features, spatial_features
from .filtering import LatticeFilter, normalised_filter, padded
from .settings import CRFSettings

CACHED_SHAPES = 4
CACHED_PIXELS = 1 << 20
NEVER = -60.0
EXP_LIMIT = 80.0


class DenseCRF:
    """Kernels of one picture, built once, for any number of inferences.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011, algorithm 1.
    """

    def __init__(self, kernels: Sequence[tuple[LatticeFilter, float]]):
        """
        Args:
            kernels: filters over the same points with their weights, none negative.
        """
        self.kernels = tuple(kernels)

    @classmethod
    def of_features(cls, kernels: Sequence[tuple[Float[Tensor, "_ n"], float]]) -> "DenseCRF":
        """CRF over n points from features in units of each kernel's standard deviation, with weights."""
        return cls([(normalised_filter(features), weight) for features, weight in kernels])

    @classmethod
    def of_image(cls, image: Float[Tensor, "3 h w"], settings: CRFSettings) -> "DenseCRF":
        """CRF over the pixels of an RGB image in 0..255 with the settings' two kernels."""
        _, height, width = image.shape
        scale = settings.scale(height, width)
        kernels = []
        if settings.gaussian_weight:
            theta = settings.gaussian_theta_xy * scale
            kernels.append(
                (gaussian_filter(height, width, theta, image.device), settings.gaussian_weight)
            )
        if settings.bilateral_weight:
            features = bilateral_features(
                image, settings.bilateral_theta_xy * scale, settings.bilateral_theta_rgb
            )
            kernels.append((normalised_filter(features), settings.bilateral_weight))
        return cls(kernels)

    def message(self, Q: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """sum_m w_m D_m^-1/2 K_m D_m^-1/2 Q, the term i = j included."""
        if not self.kernels:
            return torch.zeros_like(Q)
        (first, weight), *others = self.kernels
        total = first(Q).mul_(weight)
        for kernel, weight in others:
            total.add_(kernel(Q), alpha=weight)
        return total

    def infer(self, unary: Float[Tensor, "labels n"], iterations: int) -> Float[Tensor, "labels n"]:
        """Marginals Q of two labels or more: Q = softmax(-U), then Q <- softmax(-U + message(Q)).

        Logits count only up to a number common to all labels, so those of the last are taken for
        0, and what is filtered is the others' lead in probability over the last.
        """
        if len(unary) < 2:
            raise ValueError(f"Bad unary. Expected at least 2 labels, got {len(unary)}.")
        count, n = len(unary) - 1, unary.shape[1]
        base = unary.new_full((n, padded(unary.device, count)), NEVER)
        base[:, :count] = (unary[-1:] - unary[:-1]).t()
        lead = self.lead_for(base)
        logits = base.clone()
        for _ in range(iterations):
            logits = self.message(lead(logits)).add_(base)
        logits = F.pad(logits[:, :count], (0, 1)).t()
        return torch.softmax(logits, dim=0)

    def infer_alone(self, logits: Float[Tensor, "k n"], iterations: int) -> Float[Tensor, "k n"]:
        """Foreground marginals of k binary problems over the same points, from log-odds."""
        count = len(logits)
        spare = padded(logits.device, count) - count
        base = F.pad(logits, (0, 0, 0, spare)).t().contiguous()
        found = base.clone()
        for _ in range(iterations):
            found = self.message(two_label_lead(found)).add_(base)
        return torch.sigmoid(found[:, :count].t().contiguous())

    def lead_for(
        self, base: Float[Tensor, "n c"]
    ) -> Callable[[Float[Tensor, "n c"]], Float[Tensor, "n c"]]:
        """The fastest function for the labels' lead that is safe for logits as they may arise.

        It may write over what it is given.
        """
        if base.shape[1] == 1:
            return two_label_lead
        reach = sum(weight for _, weight in self.kernels)
        return small_lead if float(base.max()) + 2 * reach < EXP_LIMIT else any_lead


def gaussian_filter(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """The smoothness kernel. It depends on the picture's shape alone, so the last few are kept."""
    make = cached_gaussian if height * width <= CACHED_PIXELS else cached_gaussian.__wrapped__
    return make(height, width, theta, device)


@lru_cache(maxsize=CACHED_SHAPES)
def cached_gaussian(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """See :func:`gaussian_filter`; about 60 bytes a pixel stay in memory."""
    return normalised_filter(spatial_features(height, width, theta, device))


def two_label_lead(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Q_1 - Q_2 of the softmax of (logit, 0), for each channel alone."""
    return logits.div_(2).tanh_()


def small_lead(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Q_l - Q_last of the softmax of (logits, 0), without subtracting the maximum first."""
    powers = logits.clamp_(max=EXP_LIMIT).exp_()
    total = row_sum(powers).add_(1)
    return powers.sub_(1).div_(total)


def any_lead(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """The same of logits of any size."""
    Q = torch.softmax(F.pad(logits, (0, 1)), dim=1)
    return Q[:, :-1] - Q[:, -1:]


def row_sum(values: Float[Tensor, "n c"]) -> Float[Tensor, "n _"]:
    """Each row's sum, in one column or in all: on a CPU a product beats a reduction of few columns,
    and what follows is faster without broadcasting."""
    if values.device.type == "cpu":
        return values @ values.new_ones(values.shape[1], values.shape[1])
    return values.sum(dim=1, keepdim=True)
