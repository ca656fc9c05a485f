"""Batches for the denoiser: latents, fresh captions, and where their nouns belong."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.random import Generator
from torch import Tensor

from .. import vocabulary
from ..captions import Caption, Look, random_caption
from ..scenes import MOST_OBJECTS
from .data import SceneTable

LENGTH = 77
ROWS = MOST_OBJECTS + 1


def compact_ids(table: dict[str, int]) -> dict[str, int]:
    """Rows of the words in a token table that holds only them, in the order of their true ids."""
    ordered = sorted(vocabulary.WORDS, key=lambda word: table[word + "</w>"])
    return {word: row for row, word in enumerate(ordered)}


@dataclass(frozen=True)
class Batch:
    """Latents, token rows, prompt columns to watch, their true maps and weights."""

    z: Float[Tensor, "b 4 16 16"]
    tokens: Int[Tensor, "b 77"]
    select: Float[Tensor, "b k 77"]
    target: Float[Tensor, "b k 16 16"]
    weight: Float[Tensor, "b k"]


class Batches:
    """Random batches of latents with fresh captions."""

    def __init__(
        self, table: SceneTable, latents: Path, rows: dict[str, int], ground_weight: float
    ) -> None:
        self.table = table
        self.latents = np.load(latents, mmap_mode="r")
        self.rows = rows
        self.ground_weight = ground_weight

    def draw(self, index: Int[np.ndarray, " b"], rng: Generator, empty: float = 0.1) -> Batch:
        """The scenes at `index`, each with a random caption."""
        captions = [random_caption(self.looks(i), self.background(i), rng, empty) for i in index]
        return self.of(index, captions)

    def of(self, index: Int[np.ndarray, " b"], captions: list[Caption]) -> Batch:
        """The scenes at `index` with the given captions.

        Where a caption's words do not say which object they mean, there is nothing to teach.
        """
        z = torch.from_numpy(self.latents[index].copy()).float()
        labels = torch.from_numpy(self.table.labels[index])
        seen = F.one_hot(labels.long(), ROWS).permute(0, 3, 1, 2).float()
        seen = F.avg_pool2d(seen, 4)
        select = torch.zeros(len(index), ROWS, LENGTH)
        target = torch.zeros(len(index), ROWS, 16, 16)
        weight = torch.zeros(len(index), ROWS)
        for b, caption in enumerate(captions):
            named = zip(caption.nouns, caption.meant, caption.clear, strict=True)
            for row, (at, which, clear) in enumerate(named):
                select[b, row, at + 1], weight[b, row] = 1.0, float(clear)
                target[b, row] = seen[b, which + 1]
            if caption.ground is not None:
                select[b, -1, caption.ground + 1], weight[b, -1] = 1.0, self.ground_weight
                target[b, -1] = seen[b, 0]
        return Batch(z, self.tokens(captions), select, target, weight)

    def tokens(self, captions: list[Caption]) -> Int[Tensor, "b 77"]:
        """Token rows: start, the words, then end up to the full length."""
        start, end = len(self.rows), len(self.rows) + 1
        rows = torch.full((len(captions), LENGTH), end)
        rows[:, 0] = start
        for b, caption in enumerate(captions):
            words = [self.rows[word] for word in caption.words]
            rows[b, 1 : 1 + len(words)] = torch.tensor(words, dtype=torch.long)
        return rows

    def looks(self, index: int) -> list[Look]:
        """Shape, colour and pattern of a scene's objects."""
        return [
            (vocabulary.SHAPES[s], vocabulary.COLOURS[c], vocabulary.PATTERNS[p])
            for s, c, p in self.table.looks[index]
            if s >= 0
        ]

    def background(self, index: int) -> str:
        """Word of a scene's background."""
        return vocabulary.BACKGROUNDS[int(self.table.backgrounds[index])]
