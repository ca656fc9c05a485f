"""The node that makes learned concepts usable in prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.runs.concept_set import ConceptSet
from .host.application import apply_concepts
from .pictures import masks_of
from .schema import CATEGORY, Concepts, schema


class ApplyConceptTokens(io.ComfyNode):
    """Make `<name>` work in every prompt that its CLIP encodes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ApplyConceptTokens",
            display_name="Apply Concept Tokens",
            category=CATEGORY,
            search_aliases=[
                "visual concepts",
                "use concepts",
                "embedding",
                "textual inversion",
                "character",
                "apply lora",
            ],
            description="Teaches learned concepts to a MODEL and a CLIP. After this node, a regular CLIP Text "
            "Encode understands <name> in its prompt, with weights as in (<rex>:1.2), in long prompts, and as "
            "often as you like.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to draw with. Weights that were learned together with the concepts, "
                    "such as a LoRA, are applied to it.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder that will understand <name>. Take it from the same kind of "
                    "checkpoint that the concepts were learned on.",
                ),
                Concepts.Input(
                    "concepts", tooltip="Learned concepts, from Learn Concepts or Load Concepts."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How strongly the concepts and their LoRA show. 1 is as learned, 0 falls back to "
                    "the words that each concept started from (or to nothing if it had none), and above 1 "
                    "exaggerates.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Limits each concept to an area of the picture. Give one mask per concept, in the "
                    "order in which they were learned; without masks, every concept may appear anywhere. The masks "
                    "are of the whole picture: where a later node samples it tile by tile, use a second Apply "
                    "Concept Tokens without masks.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, with any learned weights applied."),
                io.Clip.Output(tooltip="Understands <name>. Connect it to CLIP Text Encode."),
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
    """Return the mask inside which each concept may act, by concept name; empty without masks.

    Raises:
        UserError: the number of masks is not the number of concepts.
    """
    if masks is None:
        return {}
    stack = masks_of(masks)
    if len(stack) != len(concepts.names):
        raise UserError(
            f"Bad number of masks. Expected {len(concepts.names)} (one for each of "
            f"{', '.join(concepts.names)}), got {len(stack)}. Combine them with Batch Masks in this order."
        )
    return dict(zip(concepts.names, stack, strict=True))
