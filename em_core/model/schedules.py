"""Noise schedules: how noise is added, and what the model predicts."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """Variance-preserving forward process with T discrete steps (DDPM).

    Attributes:
        alphas_cumprod: [T], decreasing, in 0..1.
        prediction: what the UNet predicts: the noise, or v (Salimans and Ho 2022).
    """

    alphas_cumprod: Float[Tensor, " T"]
    prediction: Prediction = "epsilon"

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def scales(
        self, t: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), ready to multiply latents."""
        alpha_bar = self.alphas_cumprod.to(t.device)[t][:, None, None, None]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(
        self, Z0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Z_t = sqrt(alpha_bar_t) Z_0 + sqrt(1 - alpha_bar_t) eps."""
        signal, noise = self.scales(t)
        return signal * Z0 + noise * eps

    def target(
        self, Z0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What the UNet ought to predict: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) Z_0."""
        if self.prediction == "epsilon":
            return eps
        signal, noise = self.scales(t)
        return signal * eps - noise * Z0


def stratified_timesteps(
    count: int, low: float, high: float, length: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """`count` steps, one uniform draw from each of `count` equal parts of [low, high) * length."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return ((low + (high - low) * u) * length).long().clamp(0, length - 1)
