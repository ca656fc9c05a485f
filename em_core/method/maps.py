"""The E-step: attention maps of one picture's concepts, and the masks that they make."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError, UserError
from ..masks.settings import MaskSettings
from ..model.columns import select_columns
from ..model.layers import map_side, mask_layers
from ..model.protocol import Conditioning, DiffusionModel
from ..model.recording import AttentionMaps, AttentionRecorder, mean_maps
from ..model.schedules import stratified_timesteps


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
