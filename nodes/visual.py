"""The node that lets a visual condition act."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from warnings import warn

from comfy_api.latest import io

from ..em_core.errors import Notice, UserError
from ..em_core.masks.resizing import cut, resize
from ..em_core.runs.visual import with_reference
from ..em_core.runs.visual_condition import VisualCondition
from .host.comfy_host import ComfyHost
from .host.families import identify
from .host.visual import apply_visual
from .pictures import masks_of, pictures_of
from .schema import CATEGORY, Condition, schema
from .telling import on_node, told_on_node


class ApplyVisualCondition(io.ComfyNode):
    """Let a visual condition act while pictures are drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ApplyVisualCondition",
            display_name="Apply Visual Condition",
            category=CATEGORY,
            search_aliases=["vico", "image prompt", "reference image", "use reference"],
            description="Lets a model look at reference pictures of the concepts in the prompt while it draws. "
            "After this node, CLIP Text Encode understands <name>. It goes with Apply Concept Tokens, ControlNet, "
            "LoRAs and other patches, before or after them.",
            inputs=[
                io.Model.Input("model", tooltip="The model to draw with."),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that will understand <name>. If it does already, from an Apply "
                    "Concept Tokens before this node, it keeps the token that it has.",
                ),
                Condition.Input(
                    "condition",
                    tooltip="From Learn Visual Condition or Load Visual Condition.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the condition acts. 1 is as learned, 0 not at all.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the condition begins to act: 0 is at the start. Raise it if the "
                    "reference's layout is copied.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the sampling the condition ceases to act: 1 is at the end.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="Pictures to look at instead of those that the condition was learned from, of any "
                    "size. Needs the VAE.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="The VAE of the checkpoint, for other references."
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the concepts are in the first reference: one mask for each, in the order in "
                    "which they were learned. Without masks they are looked for.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Looks at the references. Connect it to the sampler."),
                io.Clip.Output(tooltip="Understands <name>. Connect it to CLIP Text Encode."),
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        model: Any,
        clip: Any,
        condition: VisualCondition,
        strength: float,
        start: float,
        end: float,
        reference: Any = None,
        vae: Any = None,
        masks: Any = None,
    ) -> io.NodeOutput:
        with told_on_node() as told:
            if reference is not None:
                condition = looking_at(model, clip, vae, condition, reference, masks)
            *applied, said = apply_visual(
                model, clip, condition, condition.use(strength, (start, end))
            )
            if said:
                warn(said, Notice, stacklevel=2)
        return io.NodeOutput(*applied, ui=on_node(*told))


def looking_at(
    model: Any, clip: Any, vae: Any, condition: VisualCondition, reference: Any, masks: Any
) -> VisualCondition:
    """Return the condition with other pictures to look at.

    Raises:
        UserError: there is no VAE, the number of masks is wrong, or a concept is in none of the pictures.
    """
    if vae is None:
        raise UserError("Another reference needs the VAE. Connect that of the MODEL's checkpoint.")
    host = ComfyHost(identify(model, clip, vae))
    found = []
    try:
        for index, picture in enumerate(pictures_of(reference)):
            given = masks_by_name(condition, masks, picture) if index == 0 else None
            found += with_reference(host, condition, picture, given).references
    finally:
        host.release()
    return replace(condition, references=tuple(found))


def masks_by_name(condition: VisualCondition, masks: Any, picture: Any) -> dict[str, Any] | None:
    """Return the masks of a reference by concept, at its size; None without masks.

    Raises:
        UserError: the number of masks is not the number of concepts.
    """
    if masks is None:
        return None
    stack = masks_of(masks)
    if len(stack) != len(condition.names):
        raise UserError(
            f"Bad number of masks. Expected {len(condition.names)} (one for each of "
            f"{', '.join(condition.names)}), got {len(stack)}. Combine them with Batch Masks in this order."
        )
    size = (picture.shape[-2], picture.shape[-1])
    return dict(zip(condition.names, cut(resize(stack, size, "mask")), strict=True))
