"""Attention maps of one picture's concepts, averaged over noisy versions of it (VCD Eq. 2)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError, UserError
from ..masks.estimate import Estimate, masks_from_maps
from ..masks.settings import MaskSettings
from ..masks.thresholds import min_max
from ..model.columns import select_columns
from ..model.layers import AttentionLayer, finest_size, mask_layers
from ..model.protocol import Conditioning, DiffusionModel
from ..model.recording import AttentionMaps, AttentionRecorder, mean_maps
from ..prompts import ConceptVectors
from .problem import Prepared


def like_noise(Z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit Gaussian noise drawn on the CPU, so that every device sees the same."""
    return torch.randn(count, *Z.shape[1:], generator=generator).to(Z)


def recorder_for(
    conditioning: Conditioning,
    names: Sequence[str],
    layers: Sequence[AttentionLayer],
    device: torch.device,
    grad: bool = False,
) -> AttentionRecorder:
    """A recorder of the named concepts' columns, then the end-of-text token's.

    A concept that does not stand in a prompt gets a map of zeros.
    """
    select = {}
    for name, stream in conditioning.streams.items():
        columns = [
            [*(of_prompt.get(concept, ()) for concept in names), (end,)]
            for of_prompt, end in zip(stream.columns, stream.end, strict=True)
        ]
        select[name] = select_columns(columns, stream.length, device)
    return AttentionRecorder(select, {layer.name: layer for layer in layers}, grad)


def attention_masks(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    settings: MaskSettings,
    passes: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "k h w"], Estimate]:
    """Mean maps of `passes` passes with the given vectors, scaled to 0..1, and the masks that they
    make (VCD S1)."""
    with torch.no_grad():
        conditioning = host.encode_prompts([prepared.example.prompt], vectors)
    maps = min_max(average_maps(host, prepared, conditioning, settings, passes, generator))
    return maps, masks_from_maps(maps, prepared.size, settings, prepared.refine)


@torch.no_grad()
def average_maps(
    host: DiffusionModel,
    prepared: Prepared,
    conditioning: Conditioning,
    settings: MaskSettings,
    passes: int,
    generator: torch.Generator,
    batch: int = 10,
) -> Float[Tensor, "k h w"]:
    """Mean attention maps over `passes` noisy versions of one picture (VCD: 50 random timesteps).

    Times and noise are drawn for all passes at once, each time from a part of its own of the
    schedule, so that the result does not depend on how many passes go through the model together.

    Raises:
        TrainingError: the model's attention is not finite.
    """
    if passes < 1:
        raise UserError(f"Bad number of passes. Expected at least 1, got {passes}.")
    wanted = mask_layers(prepared.layers, settings.all_layers)
    size, k = finest_size(prepared.layers), len(prepared.names)
    t = host.schedule.draw_times(passes, generator, *settings.timesteps).to(host.device)
    eps = like_noise(prepared.Z0, passes, generator)
    total = torch.zeros(k, *size, device=prepared.Z0.device)
    for times, noise in zip(t.split(batch), eps.split(batch), strict=True):
        maps = noisy_maps(host, prepared, conditioning, wanted, times, noise)
        total = total + mean_maps(maps, wanted, size)[:, :k].sum(dim=0)
    if not torch.isfinite(total).all():
        raise TrainingError(
            "The model's attention is not finite. Use a smaller learning rate or a wider number type."
        )
    return total / passes


def noisy_maps(
    host: DiffusionModel,
    prepared: Prepared,
    conditioning: Conditioning,
    wanted: Sequence[str],
    t: Float[Tensor, " b"],
    eps: Float[Tensor, "b c h w"],
) -> AttentionMaps:
    """Maps of one batch of noisy latents under one prompt."""
    Z_t = host.schedule.add_noise(prepared.Z0.expand_as(eps), eps, t)
    repeated = conditioning.rows([0] * len(t))
    layers = [layer for layer in prepared.layers if layer.name in wanted]
    recorder = recorder_for(repeated, prepared.names, layers, host.device)
    with host.record_attention(recorder):
        host.predict(Z_t, t, repeated)
    return recorder.maps
