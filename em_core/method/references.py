"""Reference pictures of the visual phase: which one a step looks at, and how it is disturbed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.resizing import Size, resize
from ..model.protocol import visual_model
from ..model.visual import Place, keys_under
from .problem import Latent, Prepared, Problem, encode
from .state import PictureState

VIEWS = 8
TRIES = 20
ZOOM, SHIFT = 1.4, 0.1
KEPT = 0.6
Choice = tuple[int, int]
"""Number of a picture, and of one of its views."""


@dataclass(frozen=True)
class View:
    """A picture as a reference.

    Attributes:
        Z0: its latent.
        seen: concept -> place -> which of its pixels lie under the concept's mask.
    """

    Z0: Latent
    seen: Mapping[str, Mapping[str, Bool[Tensor, " n"]]]


@dataclass
class References:
    """The pictures as references, encoded once for each size that they are looked at from.

    Attributes:
        problem: what the run works on.
        pictures: their masks, which no longer change.
        found: of each picture, the concepts that were found in it.
        views: what was encoded so far.
    """

    problem: Problem
    pictures: Sequence[PictureState]
    found: Sequence[Sequence[str]]
    views: dict[tuple[int, Size], tuple[View, ...]] = field(default_factory=dict)

    def choose(self, index: int, concept: str, generator: torch.Generator) -> Choice:
        """Draw a reference for a concept of picture `index`: another picture of it, or else a view of
        the picture itself."""
        others = [i for i, names in enumerate(self.found) if concept in names and i != index]
        if others:
            return others[int(torch.randint(len(others), (), generator=generator))], 0
        count = VIEWS if self.disturbs else 1
        return index, int(torch.randint(count, (), generator=generator))

    @property
    def disturbs(self) -> bool:
        return self.problem.visual is not None and self.problem.visual.disturb

    @property
    def noise(self) -> float:
        return self.problem.visual.reference_noise if self.problem.visual else 0.0

    def view(self, choice: Choice, size: Size, itself: bool) -> View:
        """A reference at the size of the picture that looks at it.

        Args:
            choice: which one.
            size: height and width in pixels.
            itself: whether the picture looks at itself.
        """
        number, of_number = choice
        key = (number if itself else -1 - number, size)
        if key not in self.views:
            self.views[key] = tuple(self.make(number, size, itself and self.disturbs))
        return self.views[key][of_number]

    def make(self, number: int, size: Size, disturbed: bool) -> list[View]:
        """The views of one picture, the same in every run with this seed."""
        prepared, host = self.problem.pictures[number], self.problem.host
        generator = torch.Generator().manual_seed(self.problem.settings.seed * 1_000_003 + number)
        rows = [prepared.names.index(name) for name in self.found[number]]
        masks = self.pictures[number].masks[rows].float().cpu()
        moves = [draw_move(masks, size, generator) for _ in range(VIEWS)] if disturbed else [Move()]
        views = []
        for move in moves:
            picture = moved(picture_of(prepared), size, move, "reflection")
            if disturbed:
                picture = picture + self.noise * torch.randn(picture.shape, generator=generator)
            Z0 = encode(host, picture.clamp(0, 1).to(host.device))
            places = visual_model(host).image_places((Z0.shape[-2], Z0.shape[-1]))
            under = moved(masks, size, move, "zeros").to(host.device)
            views.append(View(Z0, self.seen(number, under, places)))
        return views

    def seen(
        self, number: int, masks: Float[Tensor, "k H W"], places: Sequence[Place]
    ) -> dict[str, dict[str, Bool[Tensor, " n"]]]:
        """Which pixels each concept may look at; nothing where ViCo's masks say so step by step."""
        if self.problem.visual is None or self.problem.visual.key_masks == "otsu":
            return {}
        return {
            name: {place.name: keys_under(mask, place.size) for place in places}
            for name, mask in zip(self.found[number], masks, strict=True)
        }


def picture_of(prepared: Prepared) -> Float[Tensor, "3 H W"]:
    """The picture at the size at which the model sees it, on the CPU."""
    return resize(prepared.example.picture, prepared.size, "picture")


@dataclass(frozen=True)
class Move:
    """How a picture is drawn anew.

    Attributes:
        zoom: how much larger.
        mirrored: whether left and right are exchanged.
        x, y: where its middle goes, in halves of the picture's sides.
    """

    zoom: float = 1.0
    mirrored: bool = False
    x: float = 0.0
    y: float = 0.0


def draw_move(masks: Float[Tensor, "k H W"], size: Size, generator: torch.Generator) -> Move:
    """A random move that keeps most of every mask in the picture; after some tries, none but mirroring."""
    area = masks.sum(dim=(1, 2)).clamp(min=1e-6)
    for _ in range(TRIES):
        u = torch.rand(4, generator=generator).tolist()
        zoom = math.exp((2 * u[0] - 1) * math.log(ZOOM))
        reach = abs(zoom - 1) + SHIFT
        move = Move(zoom, u[1] < 0.5, (2 * u[2] - 1) * reach, (2 * u[3] - 1) * reach)
        scale = zoom / covering(masks.shape[-2:], size)
        kept = moved(masks, size, move, "zeros").sum(dim=(1, 2)) / (area * scale**2)
        if bool((kept >= KEPT).all()):
            return move
    return Move(mirrored=move.mirrored)


def covering(picture: Sequence[int], size: Size) -> float:
    """Pixels of a picture per pixel of a size that it covers with its aspect kept."""
    return min(picture[-2] / size[0], picture[-1] / size[1])


def moved(
    images: Float[Tensor, "k H W"], size: Size, move: Move, beyond: str
) -> Float[Tensor, "k h w"]:
    """Images drawn anew at a size; `beyond` says what lies beyond their edges."""
    if move == Move() and tuple(images.shape[-2:]) == tuple(size):
        return images
    step = covering(images.shape, size) / move.zoom
    a, b = (step * size[axis] / images.shape[axis - 2] for axis in (1, 0))
    sign = -1.0 if move.mirrored else 1.0
    where = torch.tensor([[[sign * a, 0, -sign * a * move.x], [0, b, -b * move.y]]])
    grid = F.affine_grid(where, [1, len(images), *size], align_corners=False)
    return F.grid_sample(images[None], grid, "bilinear", beyond, align_corners=False)[0]
