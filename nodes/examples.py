"""The node that turns pictures and their prompts into training examples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import Notice, UserError
from ..em_core.examples import Example, NamedMasks
from ..em_core.masks.given import by_instance, inverted
from ..em_core.pictures import Picture
from ..em_core.prompts import EXAMPLE, ConceptPrompt, require_no_weights
from .automatic import why_not
from .pictures import labels_of, masks_of, pictures_of
from .schema import CATEGORY, Examples, schema
from .telling import on_node, told_on_node


class ConceptExample(io.ComfyNode):
    """Pair a picture, or a batch of them, with the prompt that marks its concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptExample",
            display_name="Concept Example",
            category=CATEGORY,
            search_aliases=[
                "training image",
                "dataset",
                "textual inversion",
                "dreambooth",
                "subject",
                "learn from image",
            ],
            description="A picture to learn from, with a prompt that marks what to learn, as in: "
            + EXAMPLE,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The picture to learn from. The pictures of a batch share one prompt.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of <rex:dog> on <shore:beach>",
                    tooltip="Describe the picture and mark each thing to learn as <name:words>, as in "
                    "<rex:dog>: learning starts from what the words mean. <name> alone starts from a word that "
                    "fits any thing, and such names are given what there is from left to right. "
                    "<name:embedding:file> goes on from an embedding that you have. A background can be a "
                    "concept too.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per concept, in the order of the prompt; with several pictures, first "
                    "all masks of the first picture, and so on. One mask alone, with separate parts, is split: "
                    "the parts are given from left to right. Learn Concepts learns from them if its masks are "
                    "'given'; otherwise it compares its own with them.",
                ),
                Examples.Input(
                    "examples",
                    optional=True,
                    tooltip="More examples to learn from, from another Concept Example.",
                ),
            ],
            outputs=[
                Examples.Output(
                    "out",
                    display_name="examples",
                    tooltip="All examples together. Connect them to Learn Concepts.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt: Any = None) -> bool | str:  # type: ignore[override]
        return (isinstance(prompt, str) and why_not(required_prompt, prompt)) or True

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        image: Tensor,
        prompt: str,
        masks: Tensor | None = None,
        examples: tuple[Example, ...] = (),
    ) -> io.NodeOutput:
        with told_on_node() as told:
            made = make_examples(image, prompt, masks)
        return io.NodeOutput((*(examples or ()), *made), ui=on_node(*told))


def make_examples(image: Any, text: str, masks: Any) -> list[Example]:
    """Make one example per picture of the batch.

    Raises:
        UserError: the prompt is empty or marks no concept, or the number of masks is wrong.
    """
    prompt = required_prompt(text)
    pictures = pictures_of(image)
    named = named_masks(masks, prompt, pictures)
    return [
        Example(picture, prompt, given, given)
        for picture, given in zip(pictures, named, strict=True)
    ]


def required_prompt(text: str) -> ConceptPrompt:
    """Return the prompt.

    Raises:
        UserError: it is empty, marks no concept, has weights, or its marks cannot be read.
    """
    if not text.strip():
        raise UserError(
            f"The prompt is empty. Describe the picture and mark its concepts, as in: {EXAMPLE}"
        )
    require_no_weights(text)
    return ConceptPrompt.parse(text).require_concepts()


def named_masks(masks: Any, prompt: ConceptPrompt, pictures: list[Picture]) -> list[NamedMasks]:
    """Return each picture's masks by concept name, resized to the picture.

    One mask for each picture, where there are several concepts, is split into its separate parts.

    Raises:
        UserError: the number of masks is wrong.
    """
    if masks is None:
        return [{} for _ in pictures]
    stack, names = masks_of(masks), prompt.names
    wanted = len(names) * len(pictures)
    if len(stack) == len(pictures) < wanted:
        return split_masks(stack, names, pictures)
    if len(stack) != wanted:
        raise UserError(
            f"Bad number of masks. Expected {wanted} (one for each of {', '.join(names)} in each of "
            f"{len(pictures)} picture(s)), got {len(stack)}. Combine them with Batch Masks in the prompt's order."
        )
    groups = stack.reshape(len(pictures), len(names), *stack.shape[-2:])
    for number, group in enumerate(groups, start=1):
        say_inverted([names[i] for i in inverted(list(group))], number if len(groups) > 1 else 0)
    return [
        dict(zip(names, labels_of(group, (picture.shape[-2], picture.shape[-1])), strict=True))
        for group, picture in zip(groups, pictures, strict=True)
    ]


def split_masks(
    stack: Tensor, names: Sequence[str], pictures: Sequence[Picture]
) -> list[NamedMasks]:
    """Return the separate parts of each picture's one mask, by concept name.

    Raises:
        UserError: one has another number of parts than there are concepts.
    """
    found: list[NamedMasks] = []
    for mask, picture in zip(stack, pictures, strict=True):
        label = labels_of(mask[None], (picture.shape[-2], picture.shape[-1]))[0]
        found.append(by_instance(label, names))
    warnings.warn(
        f"One mask for {', '.join(names)}: they have its separate parts, from left to right.",
        Notice,
        stacklevel=2,
    )
    return found


def say_inverted(names: Sequence[str], number: int) -> None:
    """Say which masks look inverted; `number` is the picture's, or 0 if there is one alone."""
    if names:
        where = f" of picture {number}" if number else ""
        warnings.warn(
            f"The mask of {', '.join(names)}{where} covers the border and not the middle. If it is inverted, put "
            "Invert Mask before this node.",
            Notice,
            stacklevel=2,
        )
