"""The masks, losses and curves of a ConceptSet in ComfyUI's types."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..em_core.examples import Example
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.show.plots import draw_curves
from .pictures import labels_of, to_images, to_mask


def mask_stack(concepts: ConceptSet, examples: Sequence[Example]) -> Float[Tensor, "n h w"]:
    """Return the mask of every concept in every example, at the pictures' size."""
    stacks = []
    for masks, example in zip(concepts.masks, examples, strict=True):
        names = example.prompt.names
        stack = torch.stack([masks[name] for name in names]).float()
        size = (example.picture.shape[-2], example.picture.shape[-1])
        stacks.append(labels_of(stack, size))
    return to_mask(stacks)


def loss_map(concepts: ConceptSet) -> dict[str, list[float]]:
    """Return the total loss of every step, as ComfyUI's own loss graph takes it."""
    names = ("loss/total", "joint_loss/total", "visual_loss/total")
    return {"loss": [value for name in names for _, value in concepts.curves.get(name, [])]}


def curves_image(concepts: ConceptSet) -> Float[Tensor, "1 h w 3"]:
    """Plot the curves."""
    return to_images([draw_curves(concepts.curves)])
