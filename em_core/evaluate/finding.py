"""Where the concepts are in a generated picture: the method's own masks stand in for a detector."""

import torch

from ..masks.settings import MaskSettings
from ..method.problem import LEAST_SPREAD
from ..model.protocol import DiffusionModel
from ..pictures import Picture
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet
from ..runs.finding import find_masks
from .evaluation import Masks


def find_concepts(
    host: DiffusionModel,
    picture: Picture,
    prompt: ConceptPrompt,
    concepts: ConceptSet,
    settings: MaskSettings,
) -> Masks:
    """Find the prompt's concepts in a picture that was drawn from it.

    Returns:
        Concept -> its mask; empty where it was not found, as in a picture of one colour.
    """
    nothing = torch.zeros(picture.shape[-2:], dtype=torch.bool)
    spread = picture.amax(dim=(1, 2)) - picture.amin(dim=(1, 2))
    if float(spread.max()) < LEAST_SPREAD:
        return dict.fromkeys(prompt.names, nothing)
    found = find_masks(host, picture, prompt, concepts, settings)
    return {
        name: nothing if name in found.missing else mask
        for name, mask in zip(found.names, found.masks, strict=True)
    }
