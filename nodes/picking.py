"""The node that takes masks apart by the names of their concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.examples import Example, NamedMasks
from ..em_core.prompts import NAME
from ..em_core.show.words import say_masks
from .automatic import why_not
from .masks import MASKS
from .schema import Examples, schema
from .telling import on_node


class ConceptMaskByName(io.ComfyNode):
    """Give the masks of one concept, or of several, by name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptMaskByName",
            display_name="Concept Mask by Name",
            category=MASKS,
            search_aliases=[
                "split masks",
                "pick mask",
                "mask of a concept",
                "inpaint mask",
            ],
            description="Gives the mask of a concept by its name, from the examples that Learn Concepts, Extract "
            "Latent Masks and Discover Concepts give. Each mask has its picture's own size, ready for inpainting, "
            "ControlNet and detailers.",
            inputs=[
                Examples.Input(
                    "examples",
                    tooltip="The examples output of Learn Concepts, Extract Latent Masks or Discover Concepts.",
                ),
                io.String.Input(
                    "names",
                    default="rex",
                    tooltip="The concept's name, as in the prompt. Several, as in 'rex, doll', give one mask each, "
                    "in this order; empty gives all, in the order of the prompt.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "mask",
                    display_name="mask",
                    is_output_list=True,
                    tooltip="The masks of these concepts, for one picture after the other.",
                ),
                io.Mask.Output(
                    "others",
                    display_name="others",
                    is_output_list=True,
                    tooltip="What belongs to the other concepts of the picture, in one mask.",
                ),
                io.Image.Output(
                    "image",
                    display_name="image",
                    is_output_list=True,
                    tooltip="The pictures that the masks are of.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, names: Any = None) -> bool | str:  # type: ignore[override]
        return (isinstance(names, str) and why_not(read_names, names)) or True

    @classmethod
    def execute(cls, examples: tuple[Example, ...], names: str) -> io.NodeOutput:  # type: ignore[override]
        wanted = read_names(names)
        having = [e for e in examples if set(wanted or e.prompt.names) <= set(e.masks)]
        if not having:
            raise UserError(why_none(examples, wanted))
        chosen = [{n: e.masks[n] for n in wanted or e.prompt.names} for e in having]
        parts = [split(each.masks, list(of)) for each, of in zip(having, chosen, strict=True)]
        return io.NodeOutput(
            [mask for mask, _ in parts],
            [others for _, others in parts],
            [rearrange(each.picture, "c h w -> 1 h w c").clone() for each in having],
            ui=on_node(f"{say_masks(chosen)}."),
        )


def read_names(text: str) -> list[str]:
    """Return the names of a list such as "rex, doll"; `<rex>` counts as rex.

    Raises:
        UserError: one of them cannot be a name.
    """
    names = [part.strip().strip("<>").strip() for part in text.split(",")]
    names = [name for name in names if name]
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"Bad name {name!r}. Expected a concept's name, or several with commas, as in: rex, doll"
            )
    return names


def why_none(examples: Sequence[Example], wanted: Sequence[str]) -> str:
    """Say why no picture has the masks that are wanted."""
    known = list(dict.fromkeys(name for each in examples for name in each.masks))
    if not known:
        return (
            "These examples have no masks. Connect the examples output of Learn Concepts, Extract Latent Masks or "
            "Discover Concepts."
        )
    return (
        f"No picture has a mask of {' and '.join(wanted)}. There are masks of: {', '.join(known)}."
    )


def split(masks: NamedMasks, wanted: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the wanted masks [k, h, w], and what the other ones cover, [1, h, w]; floats of 0 and 1."""
    mask = torch.stack([masks[name] for name in wanted])
    rest = [of for name, of in masks.items() if name not in wanted]
    others = torch.stack(rest).any(0) if rest else torch.zeros_like(mask[0])
    return mask.float(), others[None].float()
