"""How many things a picture shows, found without a word about them."""

import torch

from ..errors import UserError
from ..masks.regions import Regions, evidence, find_regions, without_islands
from ..masks.settings import MaskSettings
from ..masks.thresholds import min_max
from ..model.protocol import DiffusionModel
from ..prompts import Concept, ConceptPrompt
from .maps import read_attention
from .problem import Prepared
from .start import own_copies

SHARE = 0.25
"""Share of the best region's evidence that a region must have to be a thing."""
LEAST_CELLS = 3
"""Cells of the smallest region that is a thing."""
NAME = "concept"
ASKED = 3
"""How often the generic word stands in the prompt that things are found with."""


def nameless(count: int) -> ConceptPrompt:
    """`a photo of <concept1> and <concept2>`, the prompt of so many things that have no words.

    Such concepts are given what there is from left to right.
    """
    parts: list[str | Concept] = []
    for number in range(1, count + 1):
        parts += ["a photo of " if number == 1 else " and ", Concept(f"{NAME}{number}")]
    return ConceptPrompt(tuple(parts))


def asking(generic_word: str) -> ConceptPrompt:
    """A prompt in which a generic word stands several times, so that it can hold several things."""
    parts: list[str | Concept] = ["a photo of "]
    for number in range(1, ASKED + 1):
        parts += ["a " if number == 1 else " and a ", Concept(f"{NAME}{number}", generic_word)]
    return ConceptPrompt(tuple(parts))


def count_things(
    host: DiffusionModel,
    prepared: Prepared,
    settings: MaskSettings,
    generic_word: str,
    generator: torch.Generator,
) -> int:
    """Count the regions of self-attention that a word for any thing attends to.

    Args:
        prepared: a picture with the prompt :func:`asking`.
        settings: how regions are found.
        generic_word: a word that fits any thing.
        generator: source of the noise.

    Returns:
        The number of things, 0 where nothing stands out.

    Raises:
        UserError: the settings or the model do not give regions.
    """
    vectors = own_copies(
        {name: host.initial_vectors(generic_word, 1, generator) for name in prepared.names}
    )
    passes = settings.init_timesteps
    reading = read_attention(host, prepared, vectors, settings, passes, generator, regions=True)
    if settings.regions is None or reading.affinity is None:
        raise UserError(
            "Things cannot be found without regions of self-attention. Use settings with regions, and "
            "no patch that merges or tiles the model's pixels (ToMe, HyperTile)."
        )
    labels = find_regions(reading.affinity, prepared.self_layers[0].size, settings.regions)
    members = Regions(without_islands(labels)).members
    if len(members) < 2:
        return 0
    things = min_max(reading.maps).mean(dim=0, keepdim=True)
    found = evidence(min_max(things), members)[0]
    large = members.sum(dim=(1, 2)) >= LEAST_CELLS
    return int(((found >= SHARE * found.max()) & large).sum())
