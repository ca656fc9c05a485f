"""Pictures, masks and captions to train on elsewhere, made of examples whose masks are known."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import Notice, UserError
from ..examples import Example, NamedMasks
from ..masks.given import looks_inverted
from ..pictures import Picture
from ..prompts import ConceptPrompt

MARGIN = 0.15
"""Of a crop, as a share of the mask's own height and width, on each side."""


@dataclass(frozen=True)
class TrainingPicture:
    """A picture to train on.

    Attributes:
        subject: the concept that it is of; "" for a picture of all its concepts.
        picture: [3, H, W], RGB in 0..1.
        mask: [H, W], true where it is to be learned.
        caption: what it shows, with a trigger word in each concept's place.
    """

    subject: str
    picture: Picture
    mask: Bool[Tensor, "H W"]
    caption: str


@dataclass(frozen=True)
class Choices:
    """What is made of each example.

    Attributes:
        words: concept -> its trigger; a concept that is missing has its own name.
        apart: whether each concept has pictures of its own, for a LoRA of it alone.
        crop: whether those are cut to the concept and a margin.
        paint_out: whether the other concepts in those are painted over.
    """

    words: Mapping[str, str]
    apart: bool = False
    crop: bool = False
    paint_out: bool = False


def training_pictures(
    examples: Sequence[Example], masks: Sequence[NamedMasks], choices: Choices
) -> list[TrainingPicture]:
    """Return the pictures to train on; those whose mask is empty are left out, and said.

    Args:
        examples: pictures with prompts.
        masks: of each example, concept -> mask of the picture's size.
        choices: what is made of them.

    Raises:
        UserError: a concept has no mask, or no mask has anything in it.
    """
    made: list[TrainingPicture] = []
    for number, (example, named) in enumerate(zip(examples, masks, strict=True), start=1):
        require_masks(number, example, named)
        made += list(of_example(number, example, named, choices))
    if not made:
        raise UserError(
            "All masks are empty, so there is nothing to train on. Find or paint masks first: Extract Latent "
            "Masks, SAM, or Concept Example's masks."
        )
    return made


def of_example(
    number: int, example: Example, masks: NamedMasks, choices: Choices
) -> Iterator[TrainingPicture]:
    """Yield what is made of one example."""
    names = example.prompt.names
    filled = [name for name in names if masks[name].any()]
    for name in names:
        say_odd(number, name, masks[name])
    if not choices.apart:
        whole = torch.stack([masks[name] for name in names]).any(dim=0)
        if filled:
            yield TrainingPicture(
                "", example.picture, whole, caption(example.prompt, choices.words)
            )
        return
    for name in filled:
        picture, mask = example.picture, masks[name]
        if choices.paint_out:
            others = [masks[other] for other in filled if other != name]
            picture = painted_out(picture, others, mask)
        if choices.crop:
            rows, columns = crop_of(mask)
            picture, mask = picture[:, rows, columns], mask[rows, columns]
        alone = example.prompt.subset([name])
        yield TrainingPicture(name, picture, mask, caption(alone, choices.words))


def say_odd(number: int, name: str, mask: Bool[Tensor, "H W"]) -> None:
    """Say that a mask is empty, or looks inverted."""
    if not mask.any():
        said = "is empty, and left out"
    elif looks_inverted(mask.float()):
        said = "covers the border and not the middle. If it is inverted, invert it first"
    else:
        return
    warnings.warn(f"Picture {number}: the mask of {name} {said}.", Notice, stacklevel=2)


def require_masks(number: int, example: Example, masks: NamedMasks) -> None:
    """Refuse an example of which a concept has no mask of the picture's size.

    Raises:
        UserError: there is such a concept.
    """
    size = tuple(example.picture.shape[-2:])
    missing = [name for name in example.prompt.names if name not in masks]
    if missing:
        raise UserError(
            f"Picture {number} has no mask for {', '.join(missing)}. Expected one for each concept of its "
            "prompt: give masks to Concept Example, or connect the concepts that were learned from these examples."
        )
    for name in example.prompt.names:
        if tuple(masks[name].shape) != size:
            raise UserError(
                f"Picture {number}: the mask of {name} has the wrong size. Expected {size[1]}x{size[0]}, got "
                f"{masks[name].shape[1]}x{masks[name].shape[0]}. Use the masks of this picture."
            )


def caption(prompt: ConceptPrompt, words: Mapping[str, str]) -> str:
    """Return a prompt with each concept's trigger in its place, and none of the words it started from.

    What describes a subject's identity is left out of captions, so that the trigger has to carry it.
    """
    parts = (p if isinstance(p, str) else words.get(p.name, p.name) for p in prompt.parts)
    return " ".join("".join(parts).split())


def painted_out(
    picture: Picture, others: Sequence[Bool[Tensor, "H W"]], keep: Bool[Tensor, "H W"]
) -> Picture:
    """Return a picture with masks filled by the mean colour of what is in none of them."""
    if not others:
        return picture
    hidden = torch.stack([*others]).any(dim=0) & ~keep
    rest = ~(hidden | keep)
    shown = picture[:, rest] if rest.any() else picture.flatten(1)
    return torch.where(hidden, shown.mean(dim=1)[:, None, None], picture)


def crop_of(mask: Bool[Tensor, "H W"]) -> tuple[slice, slice]:
    """Return the rows and columns of a mask's box with a margin, inside the picture."""
    found = []
    for axis in (1, 0):
        inside = mask.any(dim=axis).nonzero().flatten()
        first, last = int(inside[0]), int(inside[-1]) + 1
        margin = round(MARGIN * (last - first))
        found.append(slice(max(0, first - margin), min(mask.shape[1 - axis], last + margin)))
    return found[0], found[1]
