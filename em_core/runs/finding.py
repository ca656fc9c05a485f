"""Masks without learning: of words or learned concepts in a picture, and refined ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..examples import Example
from ..masks.crf import CUTLER, CRFSettings, MaskRefiner, labels
from ..masks.resizing import cut, resize
from ..masks.settings import MaskSettings
from ..method.maps import attention_masks
from ..method.problem import prepare_picture
from ..method.start import known_vectors
from ..model.protocol import DiffusionModel
from ..pictures import Picture
from ..presets import em_settings
from ..prompts import ConceptPrompt
from .concept_set import ConceptSet


@dataclass(frozen=True)
class FoundMasks:
    """What was found of k concepts in a picture.

    Attributes:
        names: of the concepts, in the prompt's order.
        masks: [k, H, W] at the picture's size.
        maps: [k, h, w] the attention maps that the masks were made from, each scaled to 0..1.
    """

    names: tuple[str, ...]
    masks: Bool[Tensor, "k H W"]
    maps: Float[Tensor, "k _h _w"]


def find_masks(
    host: DiffusionModel,
    picture: Picture,
    prompt: str | ConceptPrompt,
    concepts: ConceptSet | None = None,
    settings: MaskSettings | None = None,
    seed: int = 0,
) -> FoundMasks:
    """Find what the prompt marks: `<name:words>`, or `<name>` of learned concepts.

    Args:
        host: the model, such as :class:`em_core.DiffusersHost`.
        picture: [3, H, W], RGB in 0..1.
        prompt: describes the picture, as in `a photo of <cat:cat> on <sofa:sofa>`.
        concepts: learned concepts; weights that were learned with them act too.
        settings: how maps become masks; None: what suits the model's family.
        seed: of the noise.

    Raises:
        UserError: no concept in the prompt, or one of which nothing is known.
    """
    prompt = ConceptPrompt.parse(prompt) if isinstance(prompt, str) else prompt
    example = Example(picture, prompt)
    vectors = known_vectors(host, prompt, concepts.vectors if concepts else {})
    settings = settings or em_settings(host.identity().family).masks
    prepared = prepare_picture(host, example, settings)
    generator = torch.Generator().manual_seed(seed)
    passes = settings.init_timesteps
    with host.applied(
        concepts.weights if concepts else {}, concepts.lora_scale if concepts else 1.0
    ):
        maps, estimate = attention_masks(host, prepared, vectors, settings, passes, generator)
    size = (picture.shape[-2], picture.shape[-1])
    masks = cut(resize(estimate.masks.float(), size, "mask"))
    return FoundMasks(prompt.names, masks.cpu(), maps.cpu())


def refine_masks(
    picture: Picture, masks: Shaped[Tensor, "k _h _w"], settings: CRFSettings = CUTLER
) -> Bool[Tensor, "k H W"]:
    """Masks that follow the picture's edges (DenseCRF, Kraehenbuehl and Koltun 2011).

    Args:
        picture: [3, H, W], RGB in 0..1.
        masks: of any size, 0..1 or bool.
        settings: the CRF's numbers; `joint` decides whether masks may overlap.

    Raises:
        UserError: values out of range, or a picture too large for memory.
    """
    return labels(MaskRefiner(picture, settings)(masks), settings.joint)
