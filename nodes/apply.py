"""Concepts in prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.runs.concept_set import ConceptSet
from .host.application import apply_concepts
from .pictures import masks_of
from .schema import CATEGORY, Concepts, schema


class ApplyConceptTokens(io.ComfyNode):
    """Makes `<name>` work in every prompt that this CLIP encodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ApplyConceptTokens",
            display_name="Apply Concept Tokens",
            category=CATEGORY,
            search_aliases=["use concepts", "embedding", "textual inversion", "apply lora"],
            description="After this node a plain CLIP Text Encode understands <name>: with weights, as in "
            "(<rex>:1.2), in long prompts, and as often as you like.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Gets the weights that the joint phase learned, if any."
                ),
                io.Clip.Input("clip", tooltip="Learns to read <name>."),
                Concepts.Input("concepts", tooltip="From Learn Concepts or Load Concepts."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Of the tokens and of a LoRA. 1: as learned. 0: the words the concept started from "
                    "(nothing for one without words). Above 1: exaggerated.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where each concept may act: one mask per concept, in the order in which they were "
                    "learned. Without masks they act everywhere.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="With the learned weights, if there are any."),
                io.Clip.Output(tooltip="For CLIP Text Encode: it understands <name>."),
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls, model: Any, clip: Any, concepts: ConceptSet, strength: float, masks: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(
            *apply_concepts(model, clip, concepts, strength, layout(concepts, masks))
        )


def layout(concepts: ConceptSet, masks: Any) -> dict[str, Any]:
    """Concept -> where it may act.

    Raises:
        UserError: masks of the wrong count.
    """
    if masks is None:
        return {}
    stack = masks_of(masks)
    if len(stack) != len(concepts.names):
        raise UserError(
            f"Bad number of masks. Expected {len(concepts.names)}, one for each of "
            f"{', '.join(concepts.names)}, got {len(stack)}. Join them with Batch Masks in this order."
        )
    return dict(zip(concepts.names, stack, strict=True))
