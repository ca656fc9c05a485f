"""What concepts ought to look like: their crops in the pictures that they were learned from."""

import warnings
from collections.abc import Mapping, Sequence

from ..errors import Notice, UserError
from ..examples import Example, NamedMasks, fitted_size
from ..masks.resizing import cut, resize
from ..model.protocol import DiffusionModel
from ..pictures import Picture
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet
from .crops import masked_crop
from .encoders import Pictures

References = Mapping[str, Pictures]
"""Concept -> its crops, one for each picture in which it has a mask."""


def reference_crops(
    concepts: ConceptSet, examples: Sequence[Example], host: DiffusionModel
) -> References:
    """Cut the concepts out of the pictures that they were learned from.

    True masks come first, then given ones, then those that learning found. A concept with no mask at
    all has no reference, which is told by a Notice.

    Args:
        concepts: the learned concepts.
        examples: the pictures, in the order in which they were learned from; none gives no reference.
        host: the model, which says at what size pictures are learned from.

    Raises:
        UserError: the pictures are not those that the concepts were learned from.
    """
    if not examples:
        return {}
    require_same_pictures(concepts, examples, host)
    crops: dict[str, list[Picture]] = {name: [] for name in concepts.names}
    for example, found in zip(examples, concepts.masks, strict=True):
        for name, mask in best_masks(example, found).items():
            if name in crops and bool(mask.any()):
                crops[name].append(masked_crop(example.picture, mask))
    without = [name for name, of in crops.items() if not of]
    if without:
        warnings.warn(
            f"No mask of {', '.join(without)} in the pictures it was learned from, so there is nothing to "
            "compare it with. Give masks, or learn it in a mode that finds them.",
            Notice,
            stacklevel=2,
        )
    return {name: of for name, of in crops.items() if of}


def best_masks(example: Example, found: NamedMasks) -> NamedMasks:
    """Return the most trusted mask of each concept in an example, at the picture's size."""
    size = (example.picture.shape[-2], example.picture.shape[-1])
    learned = {
        name: cut(resize(mask[None].float(), size, "mask"))[0] for name, mask in found.items()
    }
    return {**learned, **example.masks, **example.truth}


def examples_again(concepts: ConceptSet, pictures: Pictures) -> list[Example]:
    """Return the pictures that concepts were learned from, as examples with the prompts in their file.

    Raises:
        UserError: there are more or fewer pictures than the concepts were learned from.
    """
    if len(pictures) != len(concepts.prompts):
        raise UserError(
            f"Bad number of pictures. Expected the {len(concepts.prompts)} that the concepts were learned "
            f"from, in their order, got {len(pictures)}."
        )
    pairs = zip(pictures, concepts.prompts, strict=True)
    return [Example(picture, ConceptPrompt.parse(prompt)) for picture, prompt in pairs]


def require_same_pictures(
    concepts: ConceptSet, examples: Sequence[Example], host: DiffusionModel
) -> None:
    """Refuse pictures that cannot be those that the concepts were learned from.

    Raises:
        UserError: their number, prompts or shapes differ from what the concepts' file says.
    """
    names = [set(ConceptPrompt.parse(prompt).names) for prompt in concepts.prompts]
    if [set(example.prompt.names) for example in examples] != names:
        raise UserError(
            f"These are not the pictures that the concepts were learned from. Expected {len(names)} with "
            f"the prompts {'; '.join(concepts.prompts)}, got {len(examples)} with "
            f"{'; '.join(str(example.prompt) for example in examples)}."
        )
    told = concepts.settings.get("em", {}).get("image_side")
    side = told if isinstance(told, int) else host.image_side
    for number, (example, masks) in enumerate(zip(examples, concepts.masks, strict=True), start=1):
        height, width = example.picture.shape[-2:]
        size = fitted_size(height, width, side, host.image_multiple)
        wrong = [mask for mask in masks.values() if tuple(mask.shape) != size]
        if wrong:
            raise UserError(
                f"Picture {number} is not the one that the concepts were learned from: expected masks of "
                f"{size[1]}x{size[0]} for its {width}x{height} pixels, got {wrong[0].shape[-1]}x"
                f"{wrong[0].shape[-2]} in the concepts. Give the same picture, not resized or cropped."
            )
