"""Regions of a picture, from its self-attention, and which concept each of them belongs to.

Cross-attention tells where a word fits, but not where one thing ends and its neighbour begins: a
word that stands alone heats every object a little, and two concepts of one word have one map.
Self-attention tells things apart without any word, since pixels of one thing attend alike
(ConceptExpress, arXiv 2407.07077, and DiffSeg, arXiv 2308.12469, cut pictures up in this way; the
rules here are our own).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .resizing import Size, resize

FAINT = 0.15
"""Share of a map's maximum below which a region does not look like the concept at all."""
SPOT = 0.35
"""Share of a map's maximum from which a spot in the background is a thing."""
ISLAND = 0.01
"""Share of the picture up to which a region that lies within another is a part of it."""
LEAST_CELLS = 2
"""Cells of the smallest region that a concept may be anchored in."""
TOO_SMALL, BARRED = -20.0, -100.0
"""Logarithm of the evidence in a region that is smaller, and in one that is left out."""
TOLD = 0.75
"""Weight of what is told of a region, against the logarithm of a map's mean in it."""


@dataclass(frozen=True)
class Regions:
    """A picture cut up into connected regions.

    Attributes:
        labels: the region that each cell belongs to, numbered from 0.
        alike: concepts that nothing in the prompt tells apart, as indices in the prompt's order;
            they are given their regions from left to right.
        told: for each concept, what is known of each region beside its map, -1 (another thing) to 1
            (the concept); None if nothing is.
    """

    labels: Int[Tensor, "h w"]
    alike: tuple[tuple[int, ...], ...] = ()
    told: Float[Tensor, "k r"] | None = None

    @property
    def members(self) -> Float[Tensor, "r h w"]:
        """1 where a cell belongs to a region, 0 elsewhere."""
        count = int(self.labels.max()) + 1
        return (
            self.labels == torch.arange(count, device=self.labels.device)[:, None, None]
        ).float()


def divergence(P: Float[Tensor, "n n"], rows: int = 64) -> Float[Tensor, "n n"]:
    """Jensen-Shannon divergence of each two rows of `P`, in nats: 0 to log 2.

    Args:
        P: self-attention probabilities; each row sums to 1.
        rows: computed at a time, which bounds the memory.
    """

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(dim=-1)

    own = entropy(P)
    parts = [
        entropy((some[:, None] + P[None]) / 2) - (entropy(some)[:, None] + own[None]) / 2
        for some in P.split(rows)
    ]
    return torch.cat(parts).clamp(min=0)


def find_regions(P: Float[Tensor, "n n"], size: Size, limit: float) -> Int[Tensor, "h w"]:
    """Merge neighbouring cells as long as their self-attention is alike.

    Clusters that touch are merged in the order of the mean divergence between their cells (average
    linkage), until no two that touch are nearer than `limit`.

    Args:
        P: mean self-attention of the n = h * w cells.
        size: (h, w).
        limit: largest mean divergence of what is still one region, in nats.

    Returns:
        The region of each cell, numbered in the order of their first cells.
    """
    count = size[0] * size[1]
    # On the CPU: a Mac's device has no float64, and each merge is read before the next.
    total = divergence(P.float()).cpu().double()
    touching = neighbours(size)
    cells = torch.ones_like(total[0])
    label = torch.arange(count)
    infinite = total.new_full((), torch.inf)
    cost = torch.where(touching, total, infinite)
    while count > 1:
        first, second = divmod(int(cost.argmin()), len(cost))
        if cost[first, second] > limit:
            break
        for table in (total, cells[None], touching):
            table[:, first] += table[:, second]
        total[first], touching[first] = total[:, first], touching[:, first]
        touching[first, first] = False
        touching[:, second], touching[second] = False, False
        label[label == label[second]] = label[first]
        mean = torch.where(touching[first], total[first] / (cells * cells[first]), infinite)
        cost[first], cost[:, first] = mean, mean
        cost[second], cost[:, second] = infinite, infinite
        count -= 1
    return torch.unique(label, return_inverse=True)[1].reshape(size).to(P.device)


def without_islands(labels: Int[Tensor, "h w"]) -> Int[Tensor, "h w"]:
    """Give specks that lie within a thing to the thing.

    The core of a thing, such as a dot or an eye, may attend to itself alone, and words heat it more than what
    is around it: a concept would be anchored in it, and kept out of the rest. An island is a region of at
    most `ISLAND` of the picture that touches one other region only. One in the largest region, which is the
    background, stays: it may be a small thing.

    Args:
        labels: the regions, numbered from 0 without gaps.

    Returns:
        The regions without islands, numbered from 0 without gaps.
    """
    size = (labels.shape[0], labels.shape[1])
    flat, touching = labels.flatten().cpu(), neighbours(size)
    cells = flat.bincount()
    ground = int(cells.argmax())
    while True:
        for island in (cells <= ISLAND * len(flat)).nonzero().flatten().tolist():
            mine = flat == island
            around = flat[touching[mine].any(dim=0) & ~mine].unique().tolist()
            if len(around) == 1 and around != [ground]:
                flat[mine] = around[0]
                break
        else:
            joined = torch.unique(flat, return_inverse=True)[1]
            return joined.reshape(size).to(labels.device)
        cells = flat.bincount(minlength=len(cells))


def with_spots(
    labels: Int[Tensor, "h w"], maps: Float[Tensor, "k _h _w"], height: float = SPOT
) -> Int[Tensor, "h w"]:
    """Give regions of their own to spots that self-attention has left in the background.

    A thing that looks like its surroundings is no region, but a concept that finds it heats it. Such
    a spot is a connected part of what some map reaches `height` in; it lies in the largest region and
    touches no other.

    Args:
        labels: the regions.
        maps: attention maps in 0..1, of any size.
        height: 0..1.
    """
    size = (labels.shape[0], labels.shape[1])
    hot = (resize(maps, size, "map").amax(dim=0) >= height).flatten()
    flat, touching = labels.flatten().clone(), neighbours(size).to(labels.device)
    ground = flat.bincount().argmax()
    left = hot.clone()
    while bool(left.any()):
        spot = torch.zeros_like(hot)
        spot[left.nonzero()[0]] = True
        while bool((more := touching[spot].any(dim=0) & hot & ~spot).any()):
            spot |= more
        left &= ~spot
        around = touching[spot].any(dim=0) | spot
        if int(spot.sum()) >= LEAST_CELLS and bool((flat[around] == ground).all()):
            flat[spot] = flat.max() + 1
    return flat.reshape(size)


def neighbours(size: Size) -> Bool[Tensor, "n n"]:
    """Which of a grid's cells share an edge."""
    height, width = size
    index = torch.arange(height * width).reshape(size)
    touching = torch.zeros(height * width, height * width, dtype=torch.bool)
    for one, other in ((index[:, 1:], index[:, :-1]), (index[1:], index[:-1])):
        touching[one.flatten(), other.flatten()] = True
        touching[other.flatten(), one.flatten()] = True
    return touching


def evidence(
    maps: Float[Tensor, "k _h _w"], members: Float[Tensor, "r h w"]
) -> Float[Tensor, "k r"]:
    """Mean of each map over each region."""
    small = resize(maps, (members.shape[-2], members.shape[-1]), "map").flatten(1)
    cells = members.flatten(1)
    return small @ cells.T / cells.sum(dim=1)


def anchors(
    found: Float[Tensor, "k r"], members: Float[Tensor, "r h w"], alike: Sequence[Sequence[int]]
) -> Int[Tensor, " k"] | None:
    """One region of its own for each concept, such that the product of their evidence is largest.

    Concepts that are alike have theirs from left to right (by the centroid; ties from the top).
    None where there are fewer regions than concepts.
    """
    return None if found.shape[0] > found.shape[1] else assigned(found, members, alike)


def assigned(
    found: Float[Tensor, "k r"], members: Float[Tensor, "r h w"], alike: Sequence[Sequence[int]]
) -> Int[Tensor, " k"]:
    """The anchors where there are regions enough."""
    chosen = torch.tensor(best_assignment(scores(found, members)))
    x, y = centroids(members)
    for group in alike:
        if len(group) > 1:
            mine = chosen[list(group)].tolist()
            chosen[list(group)] = torch.tensor(sorted(mine, key=lambda r: (x[r], y[r])))
    return chosen.to(found.device)


def scores(found: Float[Tensor, "k r"], members: Float[Tensor, "r h w"]) -> Float[Tensor, "k r"]:
    """Logarithm of the evidence, next to nothing in regions that are too small."""
    large = members.sum(dim=(1, 2)) >= LEAST_CELLS
    return found.clamp(min=1e-4).log().where(large, found.new_tensor(TOO_SMALL))


def margin(
    found: Float[Tensor, "k r"], members: Float[Tensor, "r h w"], alike: Sequence[Sequence[int]]
) -> float:
    """By how much the best assignment of regions surpasses the best of those in which some concept has a
    region that neither it nor one that is alike had, in the logarithm; infinite if there is none."""
    score = scores(found, members)
    if score.shape[0] > score.shape[1]:
        return float("inf")
    chosen, others = best_assignment(score), []
    rows = torch.arange(len(score))
    best = score[rows, chosen].sum()
    for concept, region in enumerate(chosen):
        group = next((list(g) for g in alike if concept in g), [concept])
        without = score.clone()
        without[group, region] = BARRED
        others.append(without[rows, best_assignment(without)].sum())
    return float(best - torch.stack(others).max())


@dataclass(frozen=True)
class Placed:
    """Concepts among a picture's regions.

    Attributes:
        members: [r, h, w], 1 where a cell belongs to a region, 0 elsewhere.
        found: [k, r], the evidence for each concept in each region.
        chosen: [k], the region that each concept is anchored in; None where there are too few.
    """

    members: Float[Tensor, "r h w"]
    found: Float[Tensor, "k r"]
    chosen: Int[Tensor, " k"] | None

    @property
    def anchors(self) -> Float[Tensor, "k h w"] | None:
        """The cells (1) of the region that each concept is anchored in."""
        return None if self.chosen is None else self.members[self.chosen]


def placed(maps: Float[Tensor, "k _h _w"], regions: Regions) -> Placed:
    """Give each concept its region, by its attention map in 0..1 of any size and what is told.

    What is told counts where it gives a concept another region than the maps alone would.
    """
    members = regions.members
    found = evidence(maps, members)
    by_map = anchors(found, members, regions.alike)
    if by_map is None or regions.told is None:
        return Placed(members, found, by_map)
    told = found * (TOLD * regions.told).exp()
    chosen = assigned(told, members, regions.alike)
    changed = (chosen != by_map)[:, None]
    return Placed(members, torch.where(changed, told, found), chosen)


def best_assignment(score: Float[Tensor, "n m"]) -> list[int]:
    """A column of its own for each row, such that the sum of the scores is largest; n <= m."""
    from scipy.optimize import linear_sum_assignment  # slow to load

    return linear_sum_assignment(score.cpu().double().numpy(), maximize=True)[1].tolist()


def centroids(members: Float[Tensor, "r h w"]) -> tuple[list[float], list[float]]:
    """Mean column and mean row of each region; exact for members of 0 and 1, so that ties are ties."""
    area = members.sum(dim=(1, 2)).clamp(min=1)
    rows = torch.arange(members.shape[1], device=members.device)
    columns = torch.arange(members.shape[2], device=members.device)
    x = (members.sum(dim=1) * columns).sum(dim=1) / area
    y = (members.sum(dim=2) * rows).sum(dim=1) / area
    return x.tolist(), y.tolist()


def belonging(concepts: Placed, share: float) -> Float[Tensor, "k h w"]:
    """How far each cell may belong to each concept: 1, or 0 in regions that are something else.

    A region is given to the concept that it resembles most, measured against the concept's own
    anchor, if it has at least `share` of the anchor's evidence. A concept keeps out of regions that
    were given to others, and of regions that look a little like it and were given to nobody: things
    that the prompt does not name.

    Args:
        concepts: the concepts among the regions.
        share: 0..1.
    """
    members, found, chosen = concepts.members, concepts.found, concepts.chosen
    if chosen is None:
        return found.new_ones(len(found), *members.shape[1:])
    number = torch.arange(len(found), device=found.device)
    resemblance = found / found[number, chosen][:, None].clamp(min=1e-6)
    resemblance[:, chosen] = 0
    resemblance[number, chosen] = torch.inf
    best, owner = resemblance.max(dim=0)
    nobody = best < share
    own = (owner[None] == number[:, None]) & ~nobody[None]
    barred = ~own & (~nobody[None] | (found > FAINT))
    mine, closed = (torch.einsum("k r, r h w -> k h w", x.float(), members) for x in (own, barred))
    # A thing reaches a little over its region's cells; its rim is barred too where it is not one's own.
    return 1 - torch.maximum(closed, grown(closed) * (1 - grown(mine)))


def grown(cells: Float[Tensor, "k h w"]) -> Float[Tensor, "k h w"]:
    """Cells of 1, and those that touch one of them at a side or a corner."""
    return F.max_pool2d(cells, 3, stride=1, padding=1)
