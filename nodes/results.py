"""The masks, losses and curves of a ConceptSet in ComfyUI's types."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..em_core.examples import Example, NamedMasks
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.show.plots import draw_curves
from .pictures import labels_of, to_images, to_mask


def mask_stack(concepts: ConceptSet, examples: Sequence[Example]) -> Float[Tensor, "n h w"]:
    """Return the mask of every concept in every example, at the first picture's size."""
    found = [each.masks for each in with_masks(examples, concepts)]
    return to_mask([torch.stack(list(masks.values())) for masks in found])


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


def loss_map(concepts: ConceptSet) -> dict[str, list[float]]:
    """Return the total loss of every step, as ComfyUI's own loss graph takes it."""
    names = ("loss/total", "joint_loss/total", "visual_loss/total")
    return {"loss": [value for name in names for _, value in concepts.curves.get(name, [])]}


def curves_image(concepts: ConceptSet) -> Float[Tensor, "1 h w 3"]:
    """Plot the curves."""
    return to_images([draw_curves(concepts.curves)])
