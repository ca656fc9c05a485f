"""Read pictures of the demo world: what is in them, where, and on what background.

The reader is a small network that ruler_train.py trained on renders alone. It knows all shapes, colours
and patterns of the world, those that the demo model never saw too. Its own errors stand in
results/ruler.md; no figure that it gives of generated pictures can be better than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from em_core.demo import shapes, textures, vocabulary
from em_core.files import read_tensors

WEIGHTS = Path(__file__).parent / "ruler.safetensors"
KIND = "visual-concepts ruler 1"
SHAPES = tuple(shapes.OUTLINES)
COLOURS = (*textures.COLOURS, *textures.NEW_COLOURS)
PATTERNS = (*textures.PATTERNS, *textures.NEW_PATTERNS)
BACKGROUNDS = vocabulary.BACKGROUNDS
WORDS = (SHAPES, COLOURS, PATTERNS)
SIZES = tuple(map(len, WORDS))
CELL = 2
"""Pixels of the picture to a cell of the network's output."""
SEEN = 0.4
"""Least confidence of a thing that counts as seen."""
NEAR = 3
"""Cells: of two peaks nearer than this, the weaker one is the same thing."""


@dataclass(frozen=True)
class Thing:
    """A thing that was seen.

    Attributes:
        x, y: its centre in pixels.
        confidence: that something is there, 0..1.
        looks: probabilities of its shape, colour and pattern, in the order of `WORDS`.
    """

    x: float
    y: float
    confidence: float
    looks: tuple[Tensor, Tensor, Tensor]

    @property
    def look(self) -> tuple[str, ...]:
        """The most probable shape, colour and pattern."""
        return tuple(words[int(p.argmax())] for words, p in zip(WORDS, self.looks, strict=True))

    def probabilities(self, look: Sequence[str]) -> tuple[float, ...]:
        """Probability of a given shape, colour and pattern, each by itself."""
        return tuple(
            float(p[words.index(word)])
            for words, p, word in zip(WORDS, self.looks, look, strict=True)
        )


@dataclass(frozen=True)
class Reading:
    """What is in a picture: its things, the surest first, and the background's probabilities."""

    things: tuple[Thing, ...]
    grounds: Float[Tensor, " g"]

    @property
    def background(self) -> str:
        """The most probable background."""
        return BACKGROUNDS[int(self.grounds.argmax())]


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def convolution(inward: int, outward: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch normalisation."""
    plain = nn.Conv2d(inward, outward, 3, stride, 1, bias=False)
    return nn.Sequential(plain, nn.BatchNorm2d(outward))


class Ruler(nn.Module):
    """A U-shaped network: at 32x32 cells, logits of a thing's centre and of its looks.

    The background's logits come from the mean and the maximum of the coarsest features.
    """

    def __init__(self, widths: tuple[int, int, int] = (48, 80, 96)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.stem = nn.Sequential(
            convolution(3, 24), nn.ReLU(), convolution(24, fine, 2), nn.ReLU()
        )
        self.fine = nn.Sequential(Block(fine), Block(fine))
        self.middle = nn.Sequential(
            convolution(fine, middle, 2), nn.ReLU(), Block(middle), Block(middle)
        )
        self.coarse = nn.Sequential(
            convolution(middle, coarse, 2), nn.ReLU(), Block(coarse), Block(coarse)
        )
        self.to_middle, self.to_fine = nn.Conv2d(coarse, middle, 1), nn.Conv2d(middle, fine, 1)
        self.up_middle, self.up_fine = Block(middle), Block(fine)
        self.head = nn.Conv2d(fine, 1 + sum(SIZES), 1)
        self.ground = nn.Linear(2 * coarse, len(BACKGROUNDS))

    def forward(
        self, x: Float[Tensor, "b 3 64 64"]
    ) -> tuple[Float[Tensor, "b c 32 32"], Float[Tensor, "b g"]]:
        """Logits of centre, shape, colour and pattern at each cell, and of the background.

        `x` has values -1 to 1.
        """
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        pooled = torch.cat([coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3))], dim=1)
        middle = self.up_middle(middle + enlarged(self.to_middle(coarse)))
        fine = self.up_fine(fine + enlarged(self.to_fine(middle)))
        return self.head(fine), self.ground(pooled)


def enlarged(x: Tensor) -> Tensor:
    """Twice as many cells each way."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


@lru_cache
def load(path: Path = WEIGHTS) -> Ruler:
    """The trained reader.

    Raises:
        UserError: the file is missing or damaged.
    """
    ruler = Ruler()
    tensors, _ = read_tensors(path, KIND)
    ruler.load_state_dict(
        {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    )
    return ruler.eval().requires_grad_(False)


@torch.no_grad()
def read(pictures: Float[Tensor, "b 3 64 64"], ruler: Ruler | None = None) -> list[Reading]:
    """Read pictures with values 0 to 1."""
    logits, grounds = (ruler or load())(pictures.float() * 2 - 1)
    # A thing is named by the nine cells around its centre, as it was in training.
    named = F.avg_pool2d(logits[:, 1:], 3, 1, 1, count_include_pad=False)
    logits = torch.cat([logits[:, :1], named], dim=1)
    return [
        Reading(things_of(of_picture), ground.softmax(dim=0))
        for of_picture, ground in zip(logits, grounds, strict=True)
    ]


def things_of(logits: Float[Tensor, "c 32 32"]) -> tuple[Thing, ...]:
    """The peaks of the centre's map that are high enough and not too near to a higher one."""
    confidence = logits[0].sigmoid()
    found: list[tuple[int, int]] = []
    for index in confidence.flatten().argsort(descending=True).tolist():
        row, column = divmod(index, logits.shape[-1])
        if confidence[row, column] < SEEN:
            break
        if all((row - r) ** 2 + (column - c) ** 2 >= NEAR**2 for r, c in found):
            found.append((row, column))
    return tuple(thing_at(logits, confidence, row, column) for row, column in found)


def thing_at(logits: Tensor, confidence: Tensor, row: int, column: int) -> Thing:
    """The thing whose centre is at a cell."""
    shape, colour, pattern = logits[1:, row, column].split(SIZES)
    return Thing(
        x=(column + 0.5) * CELL,
        y=(row + 0.5) * CELL,
        confidence=float(confidence[row, column]),
        looks=(shape.softmax(dim=0), colour.softmax(dim=0), pattern.softmax(dim=0)),
    )
