"""The fully connected CRF with Potts labels, solved by mean field."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .features import bilateral_features, spatial_features
from .filtering import LatticeFilter, normalised_filter
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

    def __init__(
        self, kernels: Sequence[tuple[LatticeFilter, float]], points: int, device: torch.device
    ):
        """
        Args:
            kernels: filters over the same points with their weights, none negative.
            points: how many points each filter is over.
            device: where the filters' tables are.
        """
        self.kernels = tuple(kernels)
        self.attraction = torch.zeros(points, 1, device=device)
        for kernel, weight in self.kernels:
            self.attraction.add_(kernel.of_ones, alpha=weight)

    @classmethod
    def of_features(cls, kernels: Sequence[tuple[Float[Tensor, "_ n"], float]]) -> "DenseCRF":
        """CRF over n points from features in units of each kernel's standard deviation, with weights."""
        features = kernels[0][0]
        built = [(normalised_filter(features), weight) for features, weight in kernels]
        return cls(built, features.shape[1], features.device)

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
        return cls(kernels, height * width, image.device)

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

        A point's marginals sum to 1, so all labels but the last are filtered, and the last one's
        message is that of all ones less the others'. Logits are relative to the last label's.
        """
        if len(unary) < 2:
            raise ValueError(f"Bad unary. Expected at least 2 labels, got {len(unary)}.")
        count = len(unary) - 1
        Q = unary.new_zeros(unary.shape[1], padded(count))
        base = torch.full_like(Q, NEVER)
        Q[:, :count] = torch.softmax(-unary, dim=0)[:-1].t()
        base[:, :count] = (unary[-1:] - unary[:-1]).t()
        base -= self.attraction
        normalise = softmax_for(base, self.attraction)
        for _ in range(iterations):
            message = self.message(Q)
            Q = normalise(message.add_(row_sum(message)).add_(base))
        Q = Q[:, :count].t()
        return torch.cat([Q, (1 - Q.sum(dim=0, keepdim=True)).clamp_(min=0)])

    def infer_alone(self, logits: Float[Tensor, "k n"], iterations: int) -> Float[Tensor, "k n"]:
        """Foreground marginals of k binary problems over the same points, from log-odds."""
        count = len(logits)
        first = F.pad(logits, (0, 0, 0, padded(count) - count)).t().contiguous()
        Q = torch.sigmoid(first)
        base = first - self.attraction
        for _ in range(iterations):
            Q = torch.sigmoid(torch.add(base, self.message(Q), alpha=2.0))
        return Q[:, :count].t().contiguous()


def gaussian_filter(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """The smoothness kernel. It depends on the picture's shape alone, so the last few are kept."""
    make = cached_gaussian if height * width <= CACHED_PIXELS else cached_gaussian.__wrapped__
    return make(height, width, theta, device)


@lru_cache(maxsize=CACHED_SHAPES)
def cached_gaussian(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """See :func:`gaussian_filter`; about 60 bytes a pixel stay in memory."""
    return normalised_filter(spatial_features(height, width, theta, device))


def padded(channels: int) -> int:
    """Channels to compute with: three cost more than four (see `filtering.WIDE`)."""
    return 4 if channels == 3 else channels


def softmax_for(
    base: Float[Tensor, "n c"], attraction: Float[Tensor, "n 1"]
) -> Callable[[Float[Tensor, "n c"]], Float[Tensor, "n c"]]:
    """The fastest softmax that is safe for logits of at most `base` plus twice `attraction`.

    It is over the c given logits and one of 0, and leaves the last out of the result.
    """
    if base.shape[1] == 1:
        return torch.sigmoid
    return small_softmax if float((base + 2 * attraction).max()) < EXP_LIMIT else any_softmax


def small_softmax(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Without the usual subtraction of the maximum."""
    powers = logits.exp_()
    return powers.div_(row_sum(powers).add_(1))


def row_sum(values: Float[Tensor, "n c"]) -> Float[Tensor, "n 1"]:
    """Sum over the few columns; on a CPU a product is several times faster than a reduction."""
    if values.device.type == "cpu":
        return values @ values.new_ones(values.shape[1], 1)
    return values.sum(dim=1, keepdim=True)


def any_softmax(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Of logits of any size."""
    return torch.softmax(F.pad(logits, (0, 1)), dim=1)[:, :-1].contiguous()
