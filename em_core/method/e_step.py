"""The E-step of a run: statistics from the M-steps' own passes, a refresh, new masks."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.estimate import masks_among
from ..masks.measures import agreement, areas, iou
from ..masks.regions import Regions
from ..masks.resizing import resize
from ..masks.thresholds import min_max
from ..model.layers import finest_size, mask_layers
from ..model.protocol import to_host
from ..model.recording import AttentionMaps, mean_maps
from .m_step import Draw
from .maps import read_attention
from .problem import Prepared, Problem
from .state import PictureState, RunState, generator_at

SAME_THING = 0.75
"""IoU with the present mask from which a new one differs at its rim only, and holds no other thing."""


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
    generator, known = generator_at(state.generator), looked_for(problem, state)
    pictures = tuple(
        e_step_picture(problem, state, prepared, picture, generator, known)
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    )
    return replace(state, pictures=pictures, generator=generator.get_state())


def looked_for(problem: Problem, state: RunState) -> set[str]:
    """The concepts that have a mask in some picture, be it one that is not believed."""
    return {
        name
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
        for name, some in zip(
            prepared.names, picture.labels.flatten(1).any(dim=1).tolist(), strict=True
        )
        if some
    }


def e_step_picture(
    problem: Problem,
    state: RunState,
    prepared: Prepared,
    picture: PictureState,
    generator: torch.Generator,
    known: Collection[str],
) -> PictureState:
    """New maps and masks of one picture.

    Concepts that are not `known` had nothing at the start and have not learned anything since; they do
    not compete with the others.

    A new mask takes the present one's place if the guards believe it, if it is worth more than that by
    evidence that neither was made from (:class:`Judge`, `MaskSettings.acceptance`), and if it does not
    rob a mask that stays of more than it gains.
    """
    settings = problem.settings
    found = to_host(picture.found, problem.host)
    maps, fresh = latest_maps(problem, state, prepared, picture, generator)
    regions = None if picture.regions is None else Regions(picture.regions, told=picture.told)
    there = [i for i, name in enumerate(prepared.names) if name in known]
    estimate = masks_among(there, maps, prepared.size, settings.masks, prepared.refine, regions)
    accepted = settings.masks.guards.accept(estimate.masks, estimate.thresholded)
    if settings.masks.acceptance:
        judge = Judge.of(picture, fresh, estimate.masks)
        present = judge.worth(picture.labels) * found
        gained = judge.worth(estimate.masks) - settings.masks.acceptance * present
        accepted &= gained >= 0
        if settings.masks.competition:
            robbed = [picture.labels & ~mask for mask in estimate.masks]
            lost = torch.stack([present - judge.worth(rest) * found for rest in robbed])
            accepted = without_robbers(accepted, gained, lost)
    masks, labels = estimate.weights(settings.masks.soft), estimate.masks
    old_masks, old_labels = picture.masks, picture.labels
    if settings.masks.competition:
        old_masks, old_labels = without_taken(labels[accepted], old_masks, old_labels)
    pixels = accepted[:, None, None]
    labels = torch.where(pixels, labels, old_labels)
    return replace(
        picture,
        maps=maps,
        pending=torch.zeros_like(picture.pending),
        pending_count=torch.zeros_like(picture.pending_count),
        masks=torch.where(pixels, masks, old_masks),
        labels=labels,
        found=(found | accepted) & (areas(labels) >= settings.masks.guards.min_area),
    )


@dataclass(frozen=True)
class Judge:
    """What masks of one picture are compared by.

    Attributes:
        maps: [k, H, W] what each mask should agree with, see :func:`evidence_for`.
        named: [k, H, W] how much the model's error says that each pixel is what a concept's first vectors
            stand for, -1 to 1; 0 where that must not count, None where it was not asked.
    """

    maps: Float[Tensor, "k H W"]
    named: Float[Tensor, "k H W"] | None

    @classmethod
    def of(
        cls, picture: PictureState, fresh: Float[Tensor, "k _h _w"], masks: Bool[Tensor, "k H W"]
    ) -> "Judge":
        """The judge of a picture's present masks and new ones, by fresh maps and what the start knew.

        The model's error tells what a thing is, and not where it ends: it is not heard where a new mask
        differs from the present one at its rim only.
        """
        size = (masks.shape[-2], masks.shape[-1])
        maps, named = resize(evidence_for(picture, fresh), size, "map"), None
        if picture.named is not None and picture.regions is not None:
            other = iou(picture.labels, masks) < SAME_THING
            named = resize(picture.named[:, picture.regions], size, "map") * other[:, None, None]
        return cls(maps, named)

    def worth(self, masks: Bool[Tensor, "k H W"]) -> Float[Tensor, " k"]:
        """The agreement of each mask with its map, times e to the power of what its pixels are named.

        Maps of a word also heat what the prompt does not name, and a token that has learned of it asks
        for more; the model's error under the word does not.
        """
        agree = agreement(self.maps, masks)
        if self.named is None:
            return agree
        pixels = masks.flatten(1).sum(dim=1).clamp(min=1)
        return agree * ((self.named * masks).flatten(1).sum(dim=1) / pixels).exp()


def evidence_for(picture: PictureState, fresh: Float[Tensor, "k h w"]) -> Float[Tensor, "k h w"]:
    """What masks are judged by: fresh maps and those of the start, half and half.

    A token that was learned under a wrong mask attends to what is wrong, and its fresh maps prefer
    it. The start's maps know nothing of that.
    """
    return fresh if picture.first is None else (min_max(fresh) + min_max(picture.first)) / 2


def without_robbers(
    accepted: Bool[Tensor, " k"], gained: Float[Tensor, " k"], lost: Float[Tensor, "k _k"]
) -> Bool[Tensor, " k"]:
    """The accepted masks without those that cost masks that stay more than they gain themselves.

    Where a name goes over to another's thing, and that one has nowhere to go, one of two good masks
    would be lost. The worst is refused first, since one that is refused stays and can be robbed.

    Args:
        gained: by how much more each new mask is worth than it must be.
        lost: how much of its worth the present mask of each concept (column) loses if the new one of
            another (row) takes its pixels.
    """
    accepted = accepted.clone()
    for _ in range(len(accepted)):
        net = (gained - (lost * ~accepted).sum(dim=1)).where(accepted, gained.new_tensor(torch.inf))
        worst = net.argmin()
        accepted[worst] &= net[worst] >= 0
    return accepted


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
) -> tuple[Float[Tensor, "k h w"], Float[Tensor, "k h w"]]:
    """Maps for new masks, each scaled to 0..1, and maps to judge them by.

    The first are the mean of what was gathered since the last E-step and of half of the refresh's
    passes, the second of the other half. Where every mask is taken, or where there is no refresh,
    nothing is held back. A concept that no pass has seen since keeps the maps that it had.
    """
    settings, host = problem.settings, problem.host
    total, count, fresh = picture.pending, picture.pending_count, None
    passes = settings.refresh
    if passes:
        reading = read_attention(host, prepared, state.vectors, settings.masks, passes, generator)
        held_back = settings.masks.acceptance > 0 and passes > 1
        maps, fresh = reading.halves if held_back else (reading.maps, None)
        passes = (passes + 1) // 2 if held_back else passes
        total, count = total + passes * maps, count + passes
    mean = total / count.clamp(min=1)[:, None, None]
    maps = torch.where(count[:, None, None] > 0, min_max(mean), picture.maps)
    return maps, maps if fresh is None else fresh
