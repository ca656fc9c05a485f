"""The node that learns concepts and finds their masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.exchange.lora import lora_tensors
from ..em_core.model.plans import AUTO, CHOICES
from ..em_core.prompts import merge_concepts
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.show.words import say_losses, say_masks
from .ahead import require_masks, require_savable
from .host.application import require_same_family
from .host.families import identify
from .learning.flow import Request, fulfil
from .results import finished, loss_map, mask_stack, with_masks
from .schema import CATEGORY, Concepts, Examples, LoraModel, LossMap, Settings, schema
from .settings import KINDS, MODES, Chosen, em_of, joint_of, say_automatic
from .telling import on_node, show_picture, told_on_node

FIND, NOTHING = "find and improve", "nothing"


class LearnConcepts(io.ComfyNode):
    """Run the EM loop and, if asked for, the joint phase after it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LearnConcepts",
            display_name="Learn Concepts (Train Token, LoRA)",
            category=CATEGORY,
            search_aliases=[
                "visual concepts",
                "dreambooth",
                "textual inversion",
                "character",
                "subject",
                "train",
                "train embedding",
                "train lora",
                "lora",
            ],
            description="Learns a token (a new word) for every concept that the examples' prompts mark, and "
            "finds each concept's mask, so there is no need to paint any. A finished run is remembered and "
            "never trained twice; an interrupted run continues where it stopped.",
            inputs=main_inputs(),
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            outputs=[
                Concepts.Output(
                    "concepts",
                    display_name="concepts",
                    tooltip="Connect them to Apply Concept Tokens, Save Concepts or Extract Latent Masks.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="The mask of every concept in every example, in order.",
                ),
                LoraModel.Output(
                    "lora",
                    display_name="lora",
                    tooltip="The weights that 'also train' learned, for ComfyUI's Save LoRA. Empty with nothing.",
                ),
                LossMap.Output(
                    "loss",
                    display_name="loss",
                    tooltip="The training loss of every step. Connect it to Plot Loss Graph.",
                ),
                io.Image.Output(
                    "curves",
                    display_name="curves",
                    tooltip="A plot of the losses, the masks' areas and, if the examples have masks, how well "
                    "the found masks match them (IoU).",
                ),
                Examples.Output(
                    "found",
                    display_name="examples",
                    tooltip="The examples with the masks that were found, each at its picture's size. Connect them "
                    "to Concept Mask by Name or Save Training Set.",
                ),
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        examples: tuple[Example, ...],
        mode: str,
        steps: int,
        seed: int,
        joint: str,
        memory: str,
        settings: Chosen | None = None,
        concepts: ConceptSet | None = None,
    ) -> io.NodeOutput:
        if not examples:
            raise UserError("There are no examples to learn from. Connect a Concept Example.")
        if MODES[mode] == "given":
            require_masks(examples)
        models, chosen = identify(model, clip, vae), settings or {}
        em = replace(em_of(models.family, mode, seed, chosen), steps=steps)
        joint_phase = joint_of(models.family, joint, chosen)
        request = Request(models, tuple(examples), em, joint_phase, memory, concepts=concepts)
        with told_on_node() as told:
            if concepts is not None:
                require_same_family(concepts, clip)
            names = [concept.name for concept in merge_concepts(e.prompt for e in examples)]
            graph, here = cls.hidden.prompt or {}, str(cls.hidden.unique_id)
            require_savable(graph, here, 0, names, models.family, clip)
            learned = fulfil(request)
        found = with_masks(examples, learned)
        curves, picture = finished(found, learned, em.mode != "none")
        show_picture(picture)
        values = say_automatic(em, joint_phase, models.image_side, chosen)
        said = [*summary(learned, em.mode), *told, values]
        return io.NodeOutput(
            learned,
            mask_stack(found),
            lora_tensors(learned),
            loss_map(learned),
            curves,
            found,
            ui=on_node(*said, last_preview=picture),
        )


def summary(concepts: ConceptSet, mode: str) -> list[str]:
    """Return what came of a run, in lines for the node."""
    words = " and ".join(f"<{name}>" for name in concepts.names)
    return [
        "" if mode == "none" else f"Masks: {say_masks(concepts.masks)}.",
        say_losses(concepts.curves),
        f"Write {words} in a prompt behind Apply Concept Tokens.",
    ]


def main_inputs() -> list[Any]:
    """Return the inputs that most users set."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model to learn on, including any LoRAs and patches applied before this node. "
            "It is not changed.",
        ),
        io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint as the MODEL."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint as the MODEL."),
        Examples.Input(
            "examples", tooltip="The pictures and prompts to learn from, from Concept Example."
        ),
        io.Combo.Input(
            "mode",
            display_name="masks",
            options=list(MODES),
            default=FIND,
            tooltip="Where the masks come from. find and improve: found at the start and improved while learning "
            "(EM). find once: found at the start and kept. given: taken from the examples. none: no masks (plain "
            "textual inversion).",
        ),
        io.Int.Input(
            "steps",
            default=400,
            min=1,
            max=20000,
            tooltip="How many training steps the concepts' tokens (the new words) get. Set 120 for the demo model.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Seed of everything random in the run. Change it to learn again with different random choices.",
        ),
        io.Combo.Input(
            "joint",
            display_name="also train",
            options=list(KINDS),
            default=NOTHING,
            tooltip="What is trained after the tokens, together with them (the joint phase). nothing: tokens only, "
            "the smallest result. LoRA: a LoRA. cross-attention: only the weights that link the picture to the "
            "prompt (keys and values of cross-attention). all weights: the whole model.",
        ),
        io.Combo.Input(
            "memory",
            display_name="memory plan",
            options=CHOICES,
            default=AUTO,
            tooltip="How to spend the graphics card's memory. automatic goes by what is free and by what the run "
            "needs, and says on the node what it chose. half: half precision (bfloat16 where the card has it), "
            "for tokens and LoRA. recomputing: slower, computes activations twice to save memory. fp8: the "
            "model's weights rest in 8 bits, the least memory. float32: full precision, which cross-attention "
            "and all weights need. When memory runs out, the next smaller way goes on from the last step.",
        ),
        Settings.Input(
            "settings",
            optional=True,
            tooltip="What few users change, from Concept Settings. Without it everything there is automatic.",
        ),
        Concepts.Input(
            "concepts",
            optional=True,
            tooltip="Concepts to go on learning from, from Load Concepts (also an embedding or LoRA of another "
            "program) or another Learn Concepts: those that the examples mark start from there, not from their "
            "words. A LoRA that came with them acts meanwhile, and stays as it is.",
        ),
    ]
