"""Masks without learning: find words or learned concepts in a picture, and refine masks."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..errors import UserError, require
from ..examples import Example
from ..masks.crf import LOCAL_COLOUR, CRFSettings, MaskRefiner, labels
from ..masks.resizing import cut, resize
from ..masks.settings import MaskSettings
from ..method.discover import asking, count_things, nameless
from ..method.problem import prepare_picture
from ..method.start import FirstMasks, alike_concepts, known_vectors, masks_of_vectors
from ..model.protocol import DiffusionModel
from ..pictures import Picture
from ..presets import em_settings
from ..prompts import ConceptPrompt
from ..settings import EMSettings
from .concept_set import ConceptSet

MOST = 8
"""How many things are found at most in a picture, unless another number is given."""


@dataclass(frozen=True)
class FoundMasks:
    """The masks of k concepts that were found in a picture.

    Attributes:
        names: the concepts' names, in the prompt's order.
        masks: the masks [k, H, W] at the picture's size.
        maps: the attention maps [k, h, w] that the masks were made from, each scaled to 0..1.
        missing: the names of those that were not found: their masks are empty, tiny, or everything.
        doubtful: the names of others that the model sees nowhere: their masks may show something else.
    """

    names: tuple[str, ...]
    masks: Bool[Tensor, "k H W"]
    maps: Float[Tensor, "k _h _w"]
    missing: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


def find_masks(
    host: DiffusionModel,
    picture: Picture,
    prompt: str | ConceptPrompt,
    concepts: ConceptSet | None = None,
    settings: MaskSettings | None = None,
    seed: int = 0,
) -> FoundMasks:
    """Find what the prompt marks as `<name:words>`, or as `<name>` for learned concepts.

    Args:
        host: the model, such as :class:`em_core.DiffusersHost`.
        picture: [3, H, W], RGB in 0..1.
        prompt: a description of the picture, such as `a photo of <cat:cat> on <sofa:sofa>`.
        concepts: learned concepts; weights that were learned with them are applied too.
        settings: how maps become masks; None takes the defaults of the model's family.
        seed: seed of the noise.

    Raises:
        UserError: the prompt marks no concept, or one that has no words and was not learned.
    """
    prompt = ConceptPrompt.parse(prompt) if isinstance(prompt, str) else prompt
    example = Example(picture, prompt)
    vectors = known_vectors(host, prompt, concepts.vectors if concepts else {})
    family = em_settings(host.identity().family)
    settings = settings or family.masks
    prepared = prepare_picture(host, example, settings)
    generator = torch.Generator().manual_seed(seed)
    learned = concepts.vectors if concepts else {}
    alike = alike_concepts([c.name if c.name in learned else c.words for c in prompt.concepts])
    with host.applied(
        concepts.weights if concepts else {}, concepts.lora_scale if concepts else 1.0
    ):
        found = masks_of_vectors(
            host, prepared, vectors, settings, alike, generator, family.generic_word
        )
    return at_size_of(picture, prompt, found, settings)


def discover(
    host: DiffusionModel,
    picture: Picture,
    settings: EMSettings | None = None,
    seed: int = 0,
    most: int = MOST,
) -> tuple[ConceptPrompt, FoundMasks]:
    """Find the things in a picture without being told what they are.

    Args:
        host: the model, such as :class:`em_core.DiffusersHost`.
        picture: [3, H, W], RGB in 0..1.
        settings: of which the masks' and the generic word count; None takes the defaults of the
            model's family.
        seed: seed of the noise.
        most: how many things to find at most; the weakest are left out.

    Returns:
        The prompt `a photo of <concept1> and <concept2>`, to learn them with, and their masks. They
        are named from left to right.

    Raises:
        UserError: nothing stands out in the picture, or the model has no self-attention to read.
    """
    settings = settings or em_settings(host.identity().family)
    word = settings.generic_word
    require("generic word", word, bool(word), "a word that fits any thing")
    prepared = prepare_picture(host, Example(picture, asking(word)), settings.masks)
    generator = torch.Generator().manual_seed(seed)
    count = min(most, count_things(host, prepared, settings.masks, word, generator))
    if count == 0:
        raise UserError(
            "Nothing stands out in the picture. Say what to find, as in: a photo of <rex:dog>"
        )
    prompt = nameless(count)
    vectors = {name: dict(host.initial_vectors(word, 1, generator)) for name in prompt.names}
    prepared = replace(prepared, example=Example(picture, prompt))
    alike = alike_concepts([""] * count)
    found = masks_of_vectors(host, prepared, vectors, settings.masks, alike, generator)
    return prompt, at_size_of(picture, prompt, found, settings.masks)


def at_size_of(
    picture: Picture, prompt: ConceptPrompt, found: FirstMasks, settings: MaskSettings
) -> FoundMasks:
    """What was found, with masks of the picture's size."""
    estimate, size = found.estimate, (picture.shape[-2], picture.shape[-1])
    masks = cut(resize(estimate.masks.float(), size, "mask"))
    fine = estimate.believed(settings.guards).cpu()
    missing, doubtful = (
        tuple(name for name, so in zip(prompt.names, which.tolist(), strict=True) if so)
        for which in (~fine, fine & found.doubtful)
    )
    return FoundMasks(prompt.names, masks.cpu(), found.maps.cpu(), missing, doubtful)


def refine_masks(
    picture: Picture, masks: Shaped[Tensor, "k _h _w"], settings: CRFSettings = LOCAL_COLOUR
) -> Bool[Tensor, "k H W"]:
    """Refine masks to follow the picture's edges (DenseCRF, Kraehenbuehl and Koltun 2011).

    Args:
        picture: [3, H, W], RGB in 0..1.
        masks: masks of any size, in 0..1 or bool.
        settings: the CRF's settings; with `joint`, masks cannot overlap.

    Raises:
        UserError: values are out of range, or the picture is too large for memory.
    """
    return labels(MaskRefiner(picture, settings)(masks), settings.joint)
