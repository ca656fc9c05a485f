"""Noise schedules: which times are drawn, how noise is added, what the model is to predict."""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Latents = Float[Tensor, "b c h w"]
Times = Float[Tensor, " b"]


@runtime_checkable
class NoiseSchedule(Protocol):
    """The forward process of a diffusion or flow model.

    Times are floats in the schedule's own unit, which is also what the model is given. Shares of
    the schedule run from 0 (a clean latent) to 1 (pure noise).
    """

    def draw_times(
        self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0
    ) -> Times:
        """`count` times, one from each of `count` equal parts of the shares [low, high)."""
        ...

    def within(self, t: Times, low: float, high: float) -> Bool[Tensor, " b"]:
        """Whether each time lies in the shares [low, high) of the schedule."""
        ...

    def add_noise(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """The noisy latent Z_t."""
        ...

    def target(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """What the model ought to predict at Z_t."""
        ...

    def weight(self, t: Times) -> Times:
        """The factor of each sample's diffusion loss."""
        ...


def stratified(
    count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Float[Tensor, " b"]:
    """One uniform draw from each of `count` equal parts of [low, high), in ascending order."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return low + (high - low) * u


@dataclass(frozen=True)
class VariancePreserving:
    """The variance-preserving process with T discrete steps (Ho et al. 2020, arXiv 2006.11239).

    Its times are the whole numbers 0 to T - 1; a time between two of them counts as the nearer one,
    since the model was trained on whole steps. A schedule whose alpha_bar ends at 0 (zero terminal
    SNR, Lin et al. 2023, arXiv 2305.08891) is one too, with v-prediction.

    Attributes:
        alphas_cumprod: [T] alpha_bar, decreasing, in 0..1.
        prediction: what the model predicts: the noise, or v (Salimans and Ho 2022,
            arXiv 2202.00512).
    """

    alphas_cumprod: Float[Tensor, " T"]
    prediction: Prediction = "epsilon"

    def to(self, device: torch.device) -> "VariancePreserving":
        """The schedule with its table on a device, so that no step has to move it there."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def draw_times(
        self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0
    ) -> Times:
        length = len(self.alphas_cumprod)
        steps = (stratified(count, generator, low, high) * length).long()
        return steps.clamp(0, length - 1).float()

    def within(self, t: Times, low: float, high: float) -> Bool[Tensor, " b"]:
        length = len(self.alphas_cumprod)
        return (t >= low * length) & (t < high * length)

    def steps(self, t: Times) -> Tensor:
        """The times as indices of `alphas_cumprod`."""
        return t.round().long()

    def scales(self, t: Times) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), ready to multiply latents."""
        alpha_bar = self.alphas_cumprod.to(t.device)[self.steps(t)][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """Z_t = sqrt(alpha_bar_t) Z_0 + sqrt(1 - alpha_bar_t) eps."""
        signal, noise = self.scales(t)
        return signal * Z0 + noise * eps

    def target(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """eps, or v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) Z_0."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self.scales(t)
        return signal * eps - noise * Z0

    def weight(self, t: Times) -> Times:
        """1 throughout, as in Break-a-Scene and VCD."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow between data and noise (Liu et al. 2022, arXiv 2209.03003).

    Its times s run from 0 (clean) to 1 (noise); the model predicts the velocity dZ_s / ds.

    Attributes:
        shift: moves the times towards the noise, s = shift u / (1 + (shift - 1) u) for a share u of
            the schedule (Esser et al. 2024, arXiv 2403.03206, Eq. 23); 1 leaves them uniform.
    """

    shift: float = 1.0

    def draw_times(
        self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0
    ) -> Times:
        u = stratified(count, generator, low, high)
        return self.shift * u / (1 + (self.shift - 1) * u)

    def shares(self, s: Times) -> Times:
        """The shares of the schedule at which the times lie: the inverse of the shift."""
        return s / (self.shift - (self.shift - 1) * s)

    def within(self, t: Times, low: float, high: float) -> Bool[Tensor, " b"]:
        u = self.shares(t)
        return (u >= low) & (u < high)

    def add_noise(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """Z_s = (1 - s) Z_0 + s eps."""
        s = t[:, None, None, None]
        return (1 - s) * Z0 + s * eps

    def target(self, Z0: Latents, eps: Latents, t: Times) -> Latents:
        """The velocity eps - Z_0, which is the same at every time."""
        return eps - Z0

    def weight(self, t: Times) -> Times:
        """1 throughout."""
        return torch.ones_like(t)
