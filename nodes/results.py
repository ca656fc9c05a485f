"""The masks, losses and curves of a ConceptSet in ComfyUI's types."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..em_core.examples import Example, NamedMasks
from ..em_core.prompts import merge_concepts
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.show.plots import draw_curves
from ..em_core.show.strip import Strip, over_curves
from .pictures import labels_of, to_images, to_mask


def mask_stack(found: Sequence[Example]) -> Float[Tensor, "n h w"]:
    """Return the mask of every concept in every example, at the first picture's size."""
    return to_mask([torch.stack(list(each.masks.values())) for each in found])


def with_masks(examples: Sequence[Example], concepts: ConceptSet) -> tuple[Example, ...]:
    """Return the examples with the masks of a run, each at its picture's size."""
    return tuple(
        replace(example, masks=at_size_of(example, masks))
        for example, masks in zip(examples, concepts.masks, strict=True)
    )


def at_size_of(example: Example, masks: NamedMasks) -> NamedMasks:
    """Return masks by name, resized to an example's picture."""
    size = (example.picture.shape[-2], example.picture.shape[-1])
    stack = torch.stack([masks[name] for name in example.prompt.names]).float()
    return dict(zip(example.prompt.names, labels_of(stack, size), strict=True))


def shown(examples: Sequence[Example], caption: str = "") -> Image.Image:
    """Draw examples under their masks, with the concepts' names."""
    names = [concept.name for concept in merge_concepts(each.prompt for each in examples)]
    strip = Strip.of([each.picture for each in examples], names)
    return strip.draw([each.masks for each in examples], caption)


def finished(
    examples: Sequence[Example], concepts: ConceptSet, has_masks: bool
) -> tuple[Float[Tensor, "1 h w 3"], Image.Image]:
    """Return a plot of a run's curves, and a picture of what it has come to: masks over curves.

    Args:
        examples: with the masks of the run.
        has_masks: whether there was anything to find.
    """
    curves = draw_curves(concepts.curves)
    plain = examples if has_masks else [replace(each, masks={}) for each in examples]
    return to_images([curves]), over_curves(shown(plain, "Finished"), curves)


def loss_map(concepts: ConceptSet) -> dict[str, list[float]]:
    """Return the total loss of every step, as ComfyUI's own loss graph takes it."""
    names = ("loss/total", "joint_loss/total", "visual_loss/total")
    return {"loss": [value for name in names for _, value in concepts.curves.get(name, [])]}
