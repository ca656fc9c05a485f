"""The fully connected CRF with Potts labels, solved by mean field."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from .features import bilateral_features, spatial_features
from .filtering import NormalisedFilter, normalised_filter
from .settings import CRFSettings

CACHED_SHAPES = 4
NEVER = -1e4


class DenseCRF:
    """Kernels of one picture, built once, for any number of inferences.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011, algorithm 1.
    """

    def __init__(self, kernels: Sequence[tuple[NormalisedFilter, float]], points: int, device: torch.device):
        """
        Args:
            kernels: filters over the same points with their weights, none negative.
            points: how many points each filter is over.
            device: where the filters' tables are.
        """
        self.kernels = tuple(kernels)
        self.attraction = self.message(torch.ones(points, 1, device=device))

    @classmethod
    def of_features(cls, kernels: Sequence[tuple[Float[Tensor, "d n"], float]]) -> "DenseCRF":
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
            kernels.append((gaussian_filter(height, width, theta, image.device), settings.gaussian_weight))
        if settings.bilateral_weight:
            features = bilateral_features(
                image, settings.bilateral_theta_xy * scale, settings.bilateral_theta_rgb
            )
            kernels.append((normalised_filter(features), settings.bilateral_weight))
        return cls(kernels, height * width, image.device)

    def message(self, Q: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """sum_m w_m D_m^-1/2 K_m D_m^-1/2 Q, the term i = j included."""
        total = torch.zeros_like(Q)
        for kernel, weight in self.kernels:
            total.add_(kernel(Q), alpha=weight)
        return total

    def infer(self, unary: Float[Tensor, "labels n"], iterations: int) -> Float[Tensor, "labels n"]:
        """Marginals Q of `labels` >= 2 labels: Q <- softmax(-U + message(Q)), first Q = softmax(-U).

        A point's marginals sum to 1, hence all but the last label are filtered and the last one's
        message is the message of all ones less the others'. Logits are relative to the last label.
        """
        channels = padded(len(unary) - 1)
        logits = unary.new_full((unary.shape[1], channels), NEVER)
        torch.sub(unary[-1:].t(), unary[:-1].t(), out=logits[:, : len(unary) - 1])
        Q = softmax_with_zero(logits)
        base = logits - self.attraction
        mix = 1 + torch.eye(channels, device=unary.device)
        for _ in range(iterations):
            Q = softmax_with_zero(torch.addmm(base, self.message(Q), mix))
        Q = Q[:, : len(unary) - 1]
        return torch.cat([Q, 1 - Q.sum(dim=1, keepdim=True)], dim=1).t().contiguous()

    def infer_alone(self, logits: Float[Tensor, "k n"], iterations: int) -> Float[Tensor, "k n"]:
        """Foreground marginals of k binary problems over the same points, from log-odds."""
        first = logits.t().contiguous()
        Q = torch.sigmoid(first)
        base = first - self.attraction
        for _ in range(iterations):
            Q = torch.sigmoid(torch.add(base, self.message(Q), alpha=2.0))
        return Q.t().contiguous()


@lru_cache(maxsize=CACHED_SHAPES)
def gaussian_filter(height: int, width: int, theta: float, device: torch.device) -> NormalisedFilter:
    """The smoothness kernel depends on the picture's shape alone, so the last few are kept."""
    return normalised_filter(spatial_features(height, width, theta, device))


def padded(channels: int) -> int:
    """Channels to compute with: three cost more than four (see `filtering.WIDE`)."""
    return 4 if channels == 3 else channels


def softmax_with_zero(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Softmax over the c given logits and a further one of 0, which is left out of the result.

    torch.softmax along a dimension of 2 to 5 entries takes many times longer.
    """
    if logits.shape[1] == 1:
        return torch.sigmoid(logits)
    largest = logits.amax(dim=1, keepdim=True).clamp_(min=0)
    powers = torch.sub(logits, largest).exp_()
    ones = powers.new_ones(logits.shape[1], 1)
    return powers.div_(torch.addmm(torch.exp(-largest), powers, ones))
