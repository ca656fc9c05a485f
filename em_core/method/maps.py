"""Attention maps of one picture's concepts, averaged over noisy versions of it (VCD Eq. 2)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TrainingError, UserError
from ..masks.settings import MaskSettings
from ..model.columns import select_columns
from ..model.layers import AttentionLayer, finest_size, mask_layers
from ..model.protocol import Conditioning, DiffusionModel, passes_at_once, to_host
from ..model.recording import AttentionRecorder, mean_maps
from ..prompts import ConceptPrompt, ConceptVectors
from .problem import Prepared


def like_noise(Z: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit Gaussian noise drawn on the CPU, so that every device sees the same."""
    noise = torch.randn(count, *Z.shape[1:], generator=generator)
    return noise.to(Z, non_blocking=Z.device.type == "cuda")


def one_time(host: DiffusionModel) -> bool:
    """Whether all samples that go through the model together need the same time.

    A host says so (`one_time`) whose model has patches that look at the first sample's alone.
    """
    return getattr(host, "one_time", False)


def recorder_for(
    conditioning: Conditioning,
    names: Sequence[str],
    layers: Sequence[AttentionLayer],
    host: DiffusionModel,
    grad: bool | Collection[str] = False,
) -> AttentionRecorder:
    """A recorder of the named concepts' columns, then the end-of-text token's.

    A concept that does not stand in a prompt gets a map of zeros. `grad` is the recorder's.
    """
    select = {}
    for name, stream in conditioning.streams.items():
        columns = [
            [*(of_prompt.get(concept, ()) for concept in names), (end,)]
            for of_prompt, end in zip(stream.columns, stream.end, strict=True)
        ]
        select[name] = to_host(select_columns(columns, stream.length), host)
    return AttentionRecorder(select, {layer.name: layer for layer in layers}, grad)


@dataclass(frozen=True)
class Reading:
    """Attention of one picture, averaged over noisy versions of it.

    Attributes:
        maps: [k, h, w] mean maps of all passes.
        halves: the same of every other pass and of the rest, for what has to be judged on passes that
            it was not made from; equal where there was one pass.
        affinity: [n, n] mean self-attention of the layers that regions are read from; None where it
            was not recorded.
    """

    maps: Float[Tensor, "k h w"]
    halves: tuple[Float[Tensor, "k h w"], Float[Tensor, "k h w"]]
    affinity: Float[Tensor, "n n"] | None


def with_rivals(prompt: ConceptPrompt, rivals: str) -> ConceptPrompt:
    """The prompt with words at its end that take the attention of what it does not name.

    The text encoders are causal, so the concepts are encoded as without them.
    """
    return ConceptPrompt((*prompt.parts, rivals)) if rivals else prompt


@torch.no_grad()
def read_attention(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    settings: MaskSettings,
    passes: int,
    generator: torch.Generator,
    regions: bool = False,
    batch: int = 10,
) -> Reading:
    """Mean attention over `passes` noisy versions of one picture (VCD: 50 random timesteps).

    Times and noise are drawn for all passes at once, each time from a part of its own of the
    schedule, so that the result does not depend on how many passes go through the model together.

    Args:
        regions: record the self-attention too.

    Raises:
        TrainingError: the model's attention is not finite.
    """
    if passes < 1:
        raise UserError(f"Bad number of passes. Expected at least 1, got {passes}.")
    prompt = with_rivals(prepared.example.prompt, settings.rivals)
    orders = prompt.orders() if settings.orders else (prompt,)
    conditioning = host.encode_prompts(orders, vectors)
    wanted = mask_layers(prepared.layers, settings.all_layers)
    among = {layer.name: layer for layer in prepared.self_layers} if regions else {}
    size, k = finest_size(prepared.layers), len(prepared.names)
    t = to_host(host.schedule.draw_times(passes, generator, *settings.timesteps), host)
    eps = like_noise(prepared.Z0, passes, generator)
    # In pairs, since halves are made of every other pass.
    order_of = torch.arange(passes) // 2 % len(orders)
    maps, affinity, seen = [], [], 0
    together = 1 if one_time(host) else passes_at_once(host, batch)
    parts = (x.split(together) for x in (order_of, t, eps))
    for order, times, noise in zip(*parts, strict=True):
        of_each = conditioning.rows(order.tolist())
        recorder = noisy_pass(host, prepared, of_each, wanted, times, noise, among)
        maps.append(mean_maps(recorder.maps, wanted, size)[:, :k])
        if recorder.affinity:
            layers = torch.stack(list(recorder.affinity.values()))
            affinity.append(layers.mean(dim=0) * (len(times) / passes))
            seen += len(times)
    every = torch.cat(maps)
    if not torch.isfinite(every).all():
        raise TrainingError(
            "The model's attention is not finite. Use a smaller learning rate or a wider number type."
        )
    halves = every[::2].mean(dim=0), every[1::2].mean(dim=0) if passes > 1 else every[0]
    # A patch may have taken a layer's own pixels from it in some of the passes.
    whole = torch.stack(affinity).sum(dim=0) * (passes / seen) if affinity else None
    return Reading(every.mean(dim=0), halves, whole)


def noisy_pass(
    host: DiffusionModel,
    prepared: Prepared,
    conditioning: Conditioning,
    wanted: Sequence[str],
    t: Float[Tensor, " b"],
    eps: Float[Tensor, "b c h w"],
    among: Mapping[str, AttentionLayer],
) -> AttentionRecorder:
    """What the recorder saw of one batch of noisy latents under one prompt."""
    Z_t = host.schedule.add_noise(prepared.Z0.expand_as(eps), eps, t)
    layers = [layer for layer in prepared.layers if layer.name in wanted]
    recorder = recorder_for(conditioning, prepared.names, layers, host)
    recorder.among = among
    with host.record_attention(recorder):
        host.predict(Z_t, t, conditioning)
    return recorder
