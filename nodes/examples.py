"""Pictures with their prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.examples import Example, NamedMasks
from ..em_core.pictures import Picture
from ..em_core.prompts import EXAMPLE, ConceptPrompt
from .pictures import labels_of, masks_of, pictures_of
from .schema import CATEGORY, Examples, schema


class ConceptExample(io.ComfyNode):
    """A picture, or a batch of them, with the prompt that names its concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptExample",
            display_name="Concept Example",
            category=CATEGORY,
            search_aliases=["training image", "dataset", "textual inversion", "learn from image"],
            description="A picture to learn from, with a prompt that marks what is to be learned, as in: "
            + EXAMPLE,
            inputs=[
                io.Image.Input(
                    "image", tooltip="The picture. A batch of pictures shares the prompt."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of <rex:dog> on <shore:beach>",
                    tooltip="Describe the picture and mark each concept as <name:words it starts from>. "
                    "<name> alone starts from the best of several random draws. A background can be a concept too.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per concept, in the prompt's order (for each picture in turn where "
                    "there are several). Mode 'given' learns under them; the other modes only compare "
                    "with them.",
                ),
                Examples.Input(
                    "examples",
                    optional=True,
                    tooltip="Further examples, from another Concept Example.",
                ),
            ],
            outputs=[
                Examples.Output(
                    "out", display_name="examples", tooltip="All examples, for Learn Concepts."
                )
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        image: Tensor,
        prompt: str,
        masks: Tensor | None = None,
        examples: tuple[Example, ...] = (),
    ) -> io.NodeOutput:
        return io.NodeOutput((*(examples or ()), *make_examples(image, prompt, masks)))


def make_examples(image: Any, text: str, masks: Any) -> list[Example]:
    """One example per picture of the batch.

    Raises:
        UserError: an empty prompt, no concept in it, or masks of the wrong count.
    """
    if not text.strip():
        raise UserError(
            f"The prompt is empty. Describe the picture and mark its concepts, as in: {EXAMPLE}"
        )
    prompt = ConceptPrompt.parse(text).require_concepts()
    pictures = pictures_of(image)
    named = named_masks(masks, prompt, pictures)
    return [
        Example(picture, prompt, given, given)
        for picture, given in zip(pictures, named, strict=True)
    ]


def named_masks(masks: Any, prompt: ConceptPrompt, pictures: list[Picture]) -> list[NamedMasks]:
    """Per picture, concept -> its mask at the picture's size."""
    if masks is None:
        return [{} for _ in pictures]
    stack, names = masks_of(masks), prompt.names
    wanted = len(names) * len(pictures)
    if len(stack) != wanted:
        raise UserError(
            f"Bad number of masks. Expected {wanted}, one for each of {', '.join(names)} in "
            f"{len(pictures)} picture(s), got {len(stack)}. Join them with Batch Masks in the prompt's order."
        )
    groups = stack.reshape(len(pictures), len(names), *stack.shape[-2:])
    return [
        dict(zip(names, labels_of(group, (p.shape[-2], p.shape[-1])), strict=True))
        for group, p in zip(groups, pictures, strict=True)
    ]
