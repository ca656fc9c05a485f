"""The E-step of a run: statistics from the M-steps' own passes, a refresh, new masks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.estimate import Estimate, masks_from_maps
from ..masks.thresholds import min_max
from ..model.layers import map_side, mask_layers
from ..model.recording import AttentionMaps, mean_maps
from ..settings import EMSettings
from .m_step import Draw
from .maps import average_maps
from .problem import Prepared, Problem
from .state import PictureState, RunState


def trained_under(estimate: Estimate, settings: EMSettings) -> Float[Tensor, "k H W"]:
    """The masks that the M-step weighs its losses with: marginals, or labels."""
    return estimate.probability if settings.masks.soft else estimate.masks.float()


def gather(problem: Problem, state: RunState, drawn: Draw, maps: AttentionMaps) -> None:
    """Add the maps of an M-step's pass to what the next E-step will average.

    Only samples whose t lies in the masks' range count, each for the concepts in its prompt.
    """
    prepared, settings = problem.pictures[drawn.index], problem.settings.masks
    layers = mask_layers(problem.host.layers, prepared.latent_size, settings.all_layers)
    size = map_side(prepared.latent_size, problem.host.layers)
    A = mean_maps({name: maps[name].detach() for name in layers}, layers, size)[
        :, : len(prepared.names)
    ]
    A = A.flip(-1) if drawn.flipped else A
    low, high = (bound * len(problem.host.schedule) for bound in settings.timesteps)
    counts = drawn.present * ((drawn.t >= low) & (drawn.t < high))[:, None]
    picture = state.pictures[drawn.index]
    picture.pending = picture.pending + (A * counts[:, :, None, None]).sum(dim=0)
    picture.pending_count = picture.pending_count + counts.sum(dim=0)


def e_step(problem: Problem, state: RunState) -> list[Bool[Tensor, "_ _ _"]]:
    """Estimate every picture's masks again; gives the labels they had before."""
    before = [picture.labels for picture in state.pictures]
    state.pictures = [
        e_step_picture(problem, state, prepared, picture)
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    ]
    return before


def e_step_picture(
    problem: Problem, state: RunState, prepared: Prepared, picture: PictureState
) -> PictureState:
    """New maps and masks of one picture; a mask that the guards do not believe stays as it was."""
    settings = problem.settings
    maps = average_rounds(picture, this_round(problem, state, prepared, picture), settings)
    estimate = masks_from_maps(maps, prepared.size, settings.masks, prepared.refine)
    accepted = settings.masks.guards.accept(estimate.masks, estimate.thresholded)
    accepted &= estimate.contrast >= settings.masks.acceptance * picture.contrast
    masks, labels = trained_under(estimate, settings), estimate.masks
    old_masks, old_labels = picture.masks, picture.labels
    if settings.masks.competition:
        old_masks, old_labels = outside(labels[accepted], old_masks, old_labels)
    pixels = accepted[:, None, None]
    return PictureState(
        maps=maps,
        rounds=picture.rounds + 1,
        pending=torch.zeros_like(picture.pending),
        pending_count=torch.zeros_like(picture.pending_count),
        masks=torch.where(pixels, masks, old_masks),
        labels=torch.where(pixels, labels, old_labels),
        contrast=torch.where(accepted, estimate.contrast, picture.contrast),
    )


def outside(
    taken: Bool[Tensor, "n H W"], masks: Float[Tensor, "k H W"], labels: Bool[Tensor, "k H W"]
) -> tuple[Float[Tensor, "k H W"], Bool[Tensor, "k H W"]]:
    """Present masks without the pixels that new ones take: a pixel has one owner (method: overlap)."""
    free = ~taken.any(dim=0)
    return masks * free, labels & free


def this_round(
    problem: Problem, state: RunState, prepared: Prepared, picture: PictureState
) -> Float[Tensor, "k h w"]:
    """Mean of the maps gathered since the last E-step and of the refresh's, scaled to 0..1 each."""
    settings, host = problem.settings, problem.host
    total, count = picture.pending, picture.pending_count
    if settings.refresh:
        with torch.no_grad():
            conditioning = host.encode_prompts([prepared.example.prompt], state.vectors)
        maps = average_maps(
            host,
            prepared.Z0,
            conditioning,
            prepared.names,
            settings.refresh,
            settings.masks,
            state.generator,
        )
        total, count = total + settings.refresh * maps, count + settings.refresh
    seen = count[:, None, None] > 0
    mean = total / count.clamp(min=1)[:, None, None]
    return torch.where(seen, min_max(mean), picture.maps)


def average_rounds(
    picture: PictureState, latest: Float[Tensor, "k h w"], settings: EMSettings
) -> Float[Tensor, "k h w"]:
    """Stochastic approximation with step sizes 1/k, the start's maps being round 1; or the latest alone."""
    if settings.averaging == "latest":
        return latest
    return picture.maps + (latest - picture.maps) / (picture.rounds + 1)
