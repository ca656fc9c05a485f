"""The E-step: attention maps of one picture's concepts, and the masks that they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .attention import (
    AttentionMaps,
    AttentionRecorder,
    CrossAttentionLayer,
    choose_layers,
    mean_maps,
    resize_maps,
    select_columns,
)
from .crf import MaskRefiner, labels
from .diffusion import Conditioning, DiffusionModel
from .errors import TrainingError, UserError
from .examples import Picture
from .masks import binarise, contrast, max_scaled, min_max
from .settings import MaskSettings

LOSS_SIDE = 16
Refine = Callable[[Float[Tensor, "k H W"]], Float[Tensor, "k H W"]]


def loss_layers(
    layers: Sequence[CrossAttentionLayer], latent_size: tuple[int, int]
) -> tuple[str, ...]:
    """Down and up layers whose maps are nearest to 16x16 (Break-a-Scene's choice for Eq. 4)."""
    side = (latent_size[0] * latent_size[1]) ** 0.5
    scales = {layer.downscale for layer in layers if layer.stage != "mid"}
    best = min(scales, key=lambda scale: abs(side / scale - LOSS_SIDE))
    return choose_layers(layers, lambda layer: layer.downscale == best and layer.stage != "mid")


def mask_layers(
    layers: Sequence[CrossAttentionLayer], latent_size: tuple[int, int], all_layers: bool
) -> tuple[str, ...]:
    """Layers that masks are read from: all, or those at least as fine as the loss's."""
    if all_layers:
        return choose_layers(layers, lambda layer: True)
    coarsest = set(loss_layers(layers, latent_size))
    limit = max(layer.downscale for layer in layers if layer.name in coarsest)
    return choose_layers(layers, lambda layer: layer.downscale <= limit and layer.stage != "mid")


def map_side(
    latent_size: tuple[int, int], layers: Sequence[CrossAttentionLayer]
) -> tuple[int, int]:
    """Size at which maps are averaged: that of the finest layer."""
    finest = min(layer.downscale for layer in layers)
    return -(-latent_size[0] // finest), -(-latent_size[1] // finest)


@dataclass(frozen=True)
class Estimate:
    """Masks of one picture.

    Attributes:
        thresholded: B, before refinement.
        probability: marginals of the refinement (or B itself), 0..1.
        masks: M, the refined labels.
        contrast: how far each normalised map is higher inside its mask than outside, at most 1.
    """

    thresholded: Bool[Tensor, "k H W"]
    probability: Float[Tensor, "k H W"]
    masks: Bool[Tensor, "k H W"]
    contrast: Float[Tensor, " k"]


def masks_from_maps(
    maps: Float[Tensor, "k h w"],
    size: tuple[int, int],
    settings: MaskSettings,
    refine: Refine | None,
) -> Estimate:
    """Normalise, enlarge, threshold and refine mean attention maps (VCD, "Mask extraction")."""
    scaled = resize_maps(maps[None], size)[0]
    scaled = min_max(scaled) if settings.normalise == "min-max" else max_scaled(scaled)
    thresholded = binarise(scaled, settings.threshold, settings.competition)
    if refine is None:
        return Estimate(
            thresholded, thresholded.float(), thresholded, contrast(scaled, thresholded)
        )
    probability = refine(thresholded.float())
    masks = labels(probability, settings.crf is None or settings.crf.joint)
    return Estimate(thresholded, probability, masks, contrast(scaled, masks))


def make_refiner(picture: Picture, settings: MaskSettings) -> Refine | None:
    """The DenseCRF of one picture, or None where it is off."""
    return None if settings.crf is None else MaskRefiner(picture, settings.crf)


def stratified_timesteps(
    count: int, low: float, high: float, length: int, generator: torch.Generator
) -> Int[Tensor, " b"]:
    """`count` steps, one uniform draw from each of `count` equal parts of [low, high) * length."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return ((low + (high - low) * u) * length).long().clamp(0, length - 1)


def like_noise(Z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit Gaussian noise drawn on the CPU, so that every device sees the same."""
    return torch.randn(count, *Z.shape[1:], generator=generator).to(Z)


def recorder_for(
    host: DiffusionModel,
    conditioning: Conditioning,
    names: Sequence[str],
    latent_size: tuple[int, int],
    layers: Sequence[str],
    grad: bool = False,
) -> AttentionRecorder:
    """A recorder of the named concepts' columns, then the end-of-text token's.

    A concept absent from a prompt gets a zero map.
    """
    columns = [
        [*(of_prompt.get(name, ()) for name in names), (end,)]
        for of_prompt, end in zip(conditioning.columns, conditioning.end, strict=True)
    ]
    select = select_columns(columns, conditioning.y.shape[1], host.device)
    return AttentionRecorder(select, latent_size, frozenset(layers), grad)


@torch.no_grad()
def average_maps(
    host: DiffusionModel,
    Z0: Float[Tensor, "1 c h w"],
    conditioning: Conditioning,
    names: Sequence[str],
    passes: int,
    settings: MaskSettings,
    generator: torch.Generator,
    batch: int = 10,
) -> Float[Tensor, "k h w"]:
    """Mean attention maps over `passes` noisy versions of one picture (VCD: 50 random timesteps)."""
    size = tuple(Z0.shape[-2:])
    layers = mask_layers(host.layers, (size[0], size[1]), settings.all_layers)
    total: Tensor | None = None
    for start in range(0, passes, batch):
        count = min(batch, passes - start)
        maps = noisy_maps(host, Z0, conditioning, names, layers, count, settings, generator)
        mean = mean_maps(maps, layers, map_side((size[0], size[1]), host.layers))
        summed = mean[:, : len(names)].sum(dim=0)
        total = summed if total is None else total + summed
    if total is None:
        raise UserError(f"Bad number of passes. Expected at least 1, got {passes}.")
    if not torch.isfinite(total).all():
        raise TrainingError(
            "The model's attention is not finite. Use a smaller learning rate or a wider number type."
        )
    return total / passes


def noisy_maps(
    host: DiffusionModel,
    Z0: Float[Tensor, "1 c h w"],
    conditioning: Conditioning,
    names: Sequence[str],
    layers: Sequence[str],
    count: int,
    settings: MaskSettings,
    generator: torch.Generator,
) -> AttentionMaps:
    """Maps of one batch of `count` noisy latents."""
    low, high = settings.timesteps
    t = stratified_timesteps(count, low, high, len(host.schedule), generator).to(host.device)
    Z_t = host.schedule.add_noise(Z0.expand(count, -1, -1, -1), like_noise(Z0, count, generator), t)
    repeated = conditioning.rows([0] * count)
    recorder = recorder_for(host, repeated, names, (Z0.shape[-2], Z0.shape[-1]), layers)
    with host.record_attention(recorder):
        host.predict_noise(Z_t, t, repeated)
    return recorder.maps
