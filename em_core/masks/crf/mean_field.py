"""Mean-field inference in the fully connected CRF with Potts labels."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .features import bilateral_features, spatial_features
from .filtering import LatticeFilter, normalised_filter
from .paths import FilterPath, choose_path
from .settings import CRFSettings

CACHED_SHAPES = 4
CACHED_PIXELS = 1 << 20
PADDING_LOGIT = -60.0  # probability e^-60, lost in rounding
EXP_LIMIT = 80.0  # e^80 fits into float32, with room for a sum


class DenseCRF:
    """The kernels of one picture, built once and used for any number of inferences.

    Source: Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials", 2011, algorithm 1.
    """

    def __init__(self, kernels: Sequence[tuple[LatticeFilter, float]]):
        """
        Args:
            kernels: filters over the same points, each with its weight, which must not be negative.
        """
        self.kernels = tuple(kernels)

    @classmethod
    def of_image(
        cls,
        image: Float[Tensor, "3 h w"],
        settings: CRFSettings,
        appearance: LatticeFilter | None = None,
    ) -> "DenseCRF":
        """CRF over the pixels of an RGB image in 0..255, with the two kernels of the settings.

        `appearance` is the second one, if it has been built already.
        """
        _, height, width = image.shape
        scale = settings.scale(height, width)
        kernels = []
        if settings.gaussian_weight:
            theta = settings.gaussian_theta_xy * scale
            kernels.append(
                (gaussian_filter(height, width, theta, image.device), settings.gaussian_weight)
            )
        if settings.bilateral_weight:
            appearance = appearance or appearance_filter(image, settings)
            kernels.append((appearance, settings.bilateral_weight))
        return cls(kernels)

    def message(self, Q: Float[Tensor, "n c"], path: FilterPath) -> Float[Tensor, "n c"]:
        """sum_m w_m D_m^-1/2 K_m D_m^-1/2 Q, including the terms i = j."""
        if not self.kernels:
            return torch.zeros_like(Q)
        (first, weight), *others = self.kernels
        total = first(Q, path).mul_(weight)
        for kernel, weight in others:
            total.add_(kernel(Q, path), alpha=weight)
        return total

    def infer(
        self,
        unary: Float[Tensor, "labels n"],
        iterations: int,
        path: FilterPath | None = None,
    ) -> Float[Tensor, "labels n"]:
        """Marginals Q of two or more labels: Q = softmax(-U), then Q <- softmax(-U + message(Q)).

        Adding the same number to all logits of a point does not change their softmax. The last
        label's logit is therefore fixed at 0, and the other labels' lead in probability over the
        last is what is filtered, which saves one channel.

        Args:
            unary: the energies U.
            iterations: number of updates.
            path: how to filter one channel fewer than there are labels; by default, the fastest way.
        """
        if len(unary) < 2:
            raise ValueError(f"Bad unary. Expected at least 2 labels, got {len(unary)}.")
        channels, n = len(unary) - 1, unary.shape[1]
        path = path or choose_path(unary.device, channels)
        base = unary.new_full((n, path.columns), PADDING_LOGIT)
        base[:, :channels] = (unary[-1:] - unary[:-1]).t()
        lead = self.lead_for(base, path)
        logits = base.clone()
        for _ in range(iterations):
            logits = self.message(lead(logits), path).add_(base)
        logits = F.pad(logits[:, :channels], (0, 1)).t()
        return torch.softmax(logits, dim=0)

    def infer_alone(
        self,
        logits: Float[Tensor, "k n"],
        iterations: int,
        path: FilterPath | None = None,
    ) -> Float[Tensor, "k n"]:
        """Foreground marginals of k independent binary problems over the same points.

        Args:
            logits: log-odds of each problem's foreground.
            iterations: number of updates.
            path: how to filter k channels; by default, the fastest way.
        """
        channels = len(logits)
        path = path or choose_path(logits.device, channels)
        base = F.pad(logits, (0, 0, 0, path.columns - channels)).t().contiguous()
        updated = base.clone()
        for _ in range(iterations):
            updated = self.message(two_label_lead(updated), path).add_(base)
        return torch.sigmoid(updated[:, :channels].t().contiguous())

    def lead_for(
        self, base: Float[Tensor, "n c"], path: FilterPath
    ) -> Callable[[Float[Tensor, "n c"]], Float[Tensor, "n c"]]:
        """The fastest function for the lead over the last label that cannot overflow.

        The function may overwrite its argument.

        Args:
            base: logits without messages, which bound the logits of all iterations.
            path: how the sums over labels are computed.
        """
        if base.shape[1] == 1:
            return two_label_lead
        largest_message = sum(weight for _, weight in self.kernels)
        if float(base.max()) + 2 * largest_message < EXP_LIMIT:
            return lambda logits: small_logits_lead(logits, path)
        return any_logits_lead


def appearance_filter(image: Float[Tensor, "3 h w"], settings: CRFSettings) -> LatticeFilter:
    """The appearance kernel over an RGB image in 0..255."""
    theta_xy = settings.bilateral_theta_xy * settings.scale(image.shape[1], image.shape[2])
    return normalised_filter(bilateral_features(image, theta_xy, settings.bilateral_theta_rgb))


def gaussian_filter(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """The smoothness kernel. It depends only on the picture's shape, so the last few are kept."""
    make = cached_gaussian if height * width <= CACHED_PIXELS else cached_gaussian.__wrapped__
    return make(height, width, theta, device)


@lru_cache(maxsize=CACHED_SHAPES)
def cached_gaussian(height: int, width: int, theta: float, device: torch.device) -> LatticeFilter:
    """See :func:`gaussian_filter`. Each filter holds about 60 bytes per pixel."""
    return normalised_filter(spatial_features(height, width, theta, device))


def two_label_lead(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Q_1 - Q_2 of softmax(logit, 0), for each channel on its own, in place."""
    return logits.div_(2).tanh_()


def small_logits_lead(logits: Float[Tensor, "n c"], path: FilterPath) -> Float[Tensor, "n c"]:
    """Q_l - Q_last of softmax(logits, 0), in place, without subtracting the maximum first."""
    powers = logits.clamp_(max=EXP_LIMIT).exp_()
    total = label_totals(powers, path).add_(1)
    return powers.sub_(1).div_(total)


def any_logits_lead(logits: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """The same for logits of any size."""
    Q = torch.softmax(F.pad(logits, (0, 1)), dim=1)
    return Q[:, :-1] - Q[:, -1:]


def label_totals(values: Float[Tensor, "n c"], path: FilterPath) -> Float[Tensor, "n _"]:
    """The sum of each row; a product repeats it in every column, which spares later broadcasting."""
    if path.label_totals == "product":
        return values @ values.new_ones(values.shape[1], values.shape[1])
    return values.sum(dim=1, keepdim=True)
