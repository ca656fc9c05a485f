"""New pictures of a picture's own subjects, for the joint phase: Seg-Mix (MuDI, arXiv 2404.04243).

Subjects are cut out by their masks and put together anew, at other places and sizes, so that they are
seen beside one another in more ways than the one that the picture shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.measures import areas
from ..masks.resizing import Size, cut, resize
from .problem import Latent, Prepared, Problem, encode
from .state import PictureState, RunState

GROUND = 0.5
"""A concept that covers more of the picture than this is no subject: it stays where it is, behind all."""
SCALES = (0.75, 1.25)
TRIES = 8
"""Random places that are looked at for each subject; it goes where it hides least of the others."""


@dataclass(frozen=True)
class Mix:
    """A picture that was put together.

    Attributes:
        names: the concepts in it, in the order of its prompt.
        Z0: its latent.
        masks: [k, H, W] visible pixels of each of the picture's k concepts, 0..1.
    """

    names: tuple[str, ...]
    Z0: Latent
    masks: Float[Tensor, "k H W"]


def make_mixes(problem: Problem, state: RunState) -> tuple[tuple[Mix, ...], ...] | None:
    """Of each picture, the mixes of the concepts that were found in it; None where Seg-Mix is off.

    They depend on the masks and the seed alone, so a run that goes on has those that it had.
    """
    joint = problem.joint
    if joint.seg_mix == 0:
        return None
    generator = torch.Generator().manual_seed(problem.settings.seed)
    return tuple(
        tuple(
            make_mix(problem, prepared, picture, generator)
            for _ in range(joint.seg_mix_pictures if bool(picture.found.any()) else 0)
        )
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    )


def make_mix(
    problem: Problem, prepared: Prepared, state: PictureState, generator: torch.Generator
) -> Mix:
    """Put together two or more of the concepts that were found, or the only one."""
    found = [index for index, there in enumerate(state.found.tolist()) if there]
    order = [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
    if len(found) > 2:
        order = order[: int(torch.randint(2, len(found) + 1, (), generator=generator))]
    image = resize(prepared.example.picture, prepared.size, "picture").to(state.labels.device)
    flip = problem.settings.flip
    mixed, masks = put_together(image, state.labels, order, generator, flip)
    names = tuple(prepared.names[index] for index in order)
    return Mix(names, encode(problem.host, mixed), masks.float())


def put_together(
    image: Float[Tensor, "3 H W"],
    labels: Bool[Tensor, "k H W"],
    order: Sequence[int],
    generator: torch.Generator,
    flip: bool = False,
) -> tuple[Float[Tensor, "3 H W"], Bool[Tensor, "k H W"]]:
    """The picture and the visible masks, of which those of concepts that are not in `order` are empty.

    The canvas has the mean colour of what belongs to no concept.
    """
    rest = ~labels.any(dim=0)
    rest = rest if bool(rest.any()) else torch.ones_like(rest)
    canvas = image[:, rest].mean(dim=1)[:, None, None].repeat(1, *image.shape[1:])
    masks = torch.zeros_like(labels)
    large = (areas(labels) > GROUND).tolist()
    for index in sorted(order, key=lambda i: not large[i]):
        piece, mask = image, labels[index]
        top = left = 0
        if not large[index]:
            piece, mask = cut_out(image, labels[index], generator, flip)
            top, left = free_place(masks.any(dim=0), mask, generator)
        window = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        canvas[(slice(None), *window)] = torch.where(mask, piece, canvas[(slice(None), *window)])
        masks[(slice(None), *window)] &= ~mask
        masks[(index, *window)] = mask
    return canvas, masks


def cut_out(
    image: Float[Tensor, "3 H W"],
    label: Bool[Tensor, "H W"],
    generator: torch.Generator,
    flip: bool = False,
) -> tuple[Float[Tensor, "3 h w"], Bool[Tensor, "h w"]]:
    """A subject's bounding box and its mask there, at a random size of at most the picture's."""
    rows, columns = label.any(dim=1).nonzero(), label.any(dim=0).nonzero()
    window = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )
    piece, mask = image[(slice(None), *window)], label[window].float()
    low, high = SCALES
    scale = low + (high - low) * float(torch.rand((), generator=generator))
    size = tuple(
        max(1, min(round(scale * length), most))
        for length, most in zip(mask.shape, label.shape, strict=True)
    )
    piece, mask = (
        resize(piece, (size[0], size[1]), "picture"),
        resize(mask, (size[0], size[1]), "mask"),
    )
    if flip and bool(torch.rand((), generator=generator) < 0.5):
        piece, mask = piece.flip(-1), mask.flip(-1)
    return piece, cut(mask)


def free_place(
    taken: Bool[Tensor, "H W"], mask: Bool[Tensor, "h w"], generator: torch.Generator
) -> Size:
    """The top left corner, of a few random ones, at which the mask covers the least of what is taken."""
    room = (taken.shape[0] - mask.shape[0] + 1, taken.shape[1] - mask.shape[1] + 1)
    places = [
        (
            int(torch.randint(room[0], (), generator=generator)),
            int(torch.randint(room[1], (), generator=generator)),
        )
        for _ in range(TRIES)
    ]

    def hidden(place: Size) -> int:
        top, left = place
        below = taken[top : top + mask.shape[0], left : left + mask.shape[1]]
        return int((below & mask).sum())

    return min(places, key=hidden)
