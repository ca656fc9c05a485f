"""The E-step of a run: statistics from the M-steps' own passes, a refresh, new masks."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.estimate import masks_from_maps
from ..masks.thresholds import min_max
from ..model.layers import finest_size, mask_layers
from ..model.recording import AttentionMaps, mean_maps
from .m_step import Draw
from .maps import average_maps
from .problem import Prepared, Problem
from .state import PictureState, RunState, generator_at


def with_free_statistics(
    problem: Problem, state: RunState, drawn: Draw, maps: AttentionMaps
) -> RunState:
    """The state with the maps of an M-step's pass added to what the next E-step will average.

    Only samples whose t lies in the masks' range count, each for the concepts in its prompt.
    """
    prepared, settings = problem.pictures[drawn.index], problem.settings.masks
    layers = mask_layers(prepared.layers, settings.all_layers)
    detached = {name: maps[name].detach() for name in layers}
    A = mean_maps(detached, layers, finest_size(prepared.layers))[:, : len(prepared.names)]
    A = A.flip(-1) if drawn.flipped else A
    counts = drawn.present * problem.host.schedule.within(drawn.t, *settings.timesteps)[:, None]
    before = state.pictures[drawn.index]
    after = replace(
        before,
        pending=before.pending + (A * counts[:, :, None, None]).sum(dim=0),
        pending_count=before.pending_count + counts.sum(dim=0),
    )
    pictures = list(state.pictures)
    pictures[drawn.index] = after
    return replace(state, pictures=tuple(pictures))


def e_step(problem: Problem, state: RunState) -> RunState:
    """The state with every picture's masks estimated again."""
    generator = generator_at(state.generator)
    pictures = tuple(
        e_step_picture(problem, state, prepared, picture, generator)
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    )
    return replace(state, pictures=pictures, generator=generator.get_state())


def e_step_picture(
    problem: Problem,
    state: RunState,
    prepared: Prepared,
    picture: PictureState,
    generator: torch.Generator,
) -> PictureState:
    """New maps and masks of one picture; a mask that the guards do not believe stays as it was."""
    settings = problem.settings
    maps = latest_maps(problem, state, prepared, picture, generator)
    estimate = masks_from_maps(maps, prepared.size, settings.masks, prepared.refine)
    accepted = settings.masks.guards.accept(estimate.masks, estimate.thresholded)
    accepted &= estimate.contrast >= settings.masks.acceptance * picture.contrast
    masks, labels = estimate.weights(settings.masks.soft), estimate.masks
    old_masks, old_labels = picture.masks, picture.labels
    if settings.masks.competition:
        old_masks, old_labels = without_taken(labels[accepted], old_masks, old_labels)
    pixels = accepted[:, None, None]
    return PictureState(
        maps=maps,
        pending=torch.zeros_like(picture.pending),
        pending_count=torch.zeros_like(picture.pending_count),
        masks=torch.where(pixels, masks, old_masks),
        labels=torch.where(pixels, labels, old_labels),
        contrast=torch.where(accepted, estimate.contrast, picture.contrast),
    )


def without_taken(
    taken: Bool[Tensor, "n H W"], masks: Float[Tensor, "k H W"], labels: Bool[Tensor, "k H W"]
) -> tuple[Float[Tensor, "k H W"], Bool[Tensor, "k H W"]]:
    """Masks and labels without the pixels that new masks have taken: a pixel has one owner."""
    free = ~taken.any(dim=0)
    return masks * free, labels & free


def latest_maps(
    problem: Problem,
    state: RunState,
    prepared: Prepared,
    picture: PictureState,
    generator: torch.Generator,
) -> Float[Tensor, "k h w"]:
    """Mean of the maps gathered since the last E-step and of the refresh's, each scaled to 0..1.

    A concept that no pass has seen since keeps the maps that it had.
    """
    settings, host = problem.settings, problem.host
    total, count = picture.pending, picture.pending_count
    if settings.refresh:
        with torch.no_grad():
            conditioning = host.encode_prompts([prepared.example.prompt], state.vectors)
        maps = average_maps(
            host, prepared, conditioning, settings.masks, settings.refresh, generator
        )
        total, count = total + settings.refresh * maps, count + settings.refresh
    mean = total / count.clamp(min=1)[:, None, None]
    return torch.where(count[:, None, None] > 0, min_max(mean), picture.maps)
