"""The node that learns concepts and finds their masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.exchange.lora import lora_tensors
from ..em_core.masks.crf import PRESETS
from ..em_core.presets import em_settings, joint_settings
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.settings import EMSettings, JointSettings
from ..em_core.show.words import say_losses, say_masks
from .host.families import identify
from .learning.flow import Request, fulfil
from .learning.plans import CHOICES
from .results import curves_image, loss_map, mask_stack
from .schema import ADVANCED, CATEGORY, Concepts, Examples, LoraModel, LossMap, schema
from .telling import on_node, told_on_node

AUTO = "auto"


class LearnConcepts(io.ComfyNode):
    """Run the EM loop and, if asked for, the joint phase after it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LearnConcepts",
            display_name="Learn Concepts",
            category=CATEGORY,
            search_aliases=[
                "textual inversion",
                "train embedding",
                "dreambooth",
                "train lora",
                "em",
            ],
            description="Learns a token (a new word) for every concept that the examples' prompts mark, and "
            "finds each concept's mask, so there is no need to paint any. A finished run is remembered and "
            "never trained twice; an interrupted run continues where it stopped.",
            inputs=[*main_inputs(), *advanced_inputs()],
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
                    tooltip="The weights that the joint phase learned, for ComfyUI's Save LoRA. Empty without "
                    "a joint phase.",
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
        **advanced: Any,
    ) -> io.NodeOutput:
        if not examples:
            raise UserError("There are no examples to learn from. Connect a Concept Example.")
        models = identify(model, clip, vae)
        em, joint_phase = settings_of(models.family, mode, steps, seed, joint, advanced)
        with told_on_node() as told:
            concepts = fulfil(Request(models, tuple(examples), em, joint_phase, memory))
        return io.NodeOutput(
            concepts,
            mask_stack(concepts, examples),
            lora_tensors(concepts),
            loss_map(concepts),
            curves_image(concepts),
            ui=on_node(*told, *summary(concepts, mode)),
        )


def summary(concepts: ConceptSet, mode: str) -> list[str]:
    """Return what came of a run, in lines for the node."""
    words = " and ".join(f"<{name}>" for name in concepts.names)
    return [
        "" if mode == "none" else f"Masks: {say_masks(concepts.masks)}.",
        say_losses(concepts.curves),
        f"Write {words} in a prompt behind Apply Concept Tokens.",
    ]


def settings_of(
    family: str, mode: str, steps: int, seed: int, kind: str, advanced: dict[str, Any]
) -> tuple[EMSettings, JointSettings]:
    """Return the settings of both phases: the family's defaults with the node's inputs applied.

    An advanced input that is 0 or "auto" keeps the default.

    Raises:
        UserError: a value is out of range.
    """
    em, joint = em_settings(family), joint_settings(family, kind)
    em = replace(em, mode=mode, steps=steps, seed=seed, **changed(advanced, EM_NAMES))
    em = replace(em, end_of_text_weight=advanced.get("end_of_text_weight", 0.0))
    em = replace(em, flip=advanced.get("flip", False), masks=masks_settings(em, advanced))
    joint = replace(joint, **changed(advanced, JOINT_NAMES))
    return em, replace(joint, prior_weight=advanced.get("prior_weight", 0.0))


EM_NAMES = {
    "learning_rate": "learning_rate",
    "batch": "batch",
    "vectors": "vectors",
    "attention_weight": "attention_weight",
    "e_step_every": "e_step_every",
    "resolution": "image_side",
}
JOINT_NAMES = {
    "joint_steps": "steps",
    "joint_learning_rate": "learning_rate",
    "rank": "rank",
}


def changed(advanced: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the inputs that are not 0, under the settings' names."""
    return {setting: advanced[name] for name, setting in names.items() if advanced.get(name)}


def masks_settings(em: EMSettings, advanced: dict[str, Any]) -> Any:
    """Return the mask settings with the node's inputs applied."""
    masks, crf = em.masks, advanced.get("crf", AUTO)
    if crf != AUTO:
        masks = replace(masks, crf=None if crf == "off" else PRESETS[crf])
    if advanced.get("otsu"):
        return replace(masks, threshold="otsu")
    return replace(masks, threshold=advanced["threshold"]) if advanced.get("threshold") else masks


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
            display_name="mode (mask source)",
            options=["em", "fixed", "given", "none"],
            default="em",
            tooltip="Where the masks come from. em: found at the start and updated while learning. fixed: found "
            "once at the start. given: taken from the examples. none: no masks (plain textual inversion).",
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
            display_name="also train (joint phase)",
            options=["none", "lora", "cross_attention", "full"],
            default="none",
            tooltip="Whether to go on and train the model too (the joint phase). none: tokens only, the smallest "
            "result. lora: a LoRA. cross_attention: only the weights that link the picture to the prompt (keys "
            "and values of cross-attention). full: all weights.",
        ),
        io.Combo.Input(
            "memory",
            display_name="memory plan",
            options=CHOICES,
            default="auto",
            tooltip="How to spend the graphics card's memory. auto goes by what is free and by what the run "
            "needs, and says on the node what it chose. half: half precision (bfloat16 where the card has it), "
            "for tokens and LoRA. recomputing: slower, computes activations twice to save memory. fp8: the "
            "model's weights rest in 8 bits, the least memory. float32: full precision, which cross_attention "
            "and full need. When memory runs out, the next smaller way goes on from the last step.",
        ),
    ]


def advanced_inputs() -> list[Any]:
    """Return the inputs that few users change; 0 or "auto" mostly means the value that suits the model."""
    return [*token_inputs(), *mask_inputs(), *joint_inputs()]


def number(name: str, label: str, tooltip: str, most: float = 1.0, step: float = 1e-6) -> Any:
    """An advanced number input; 0 uses what suits the model."""
    return io.Float.Input(
        name, display_name=label, default=0.0, min=0.0, max=most, step=step, round=False, optional=True,
        tooltip=f"{tooltip} 0 uses the value that suits the model.", **ADVANCED,
    )  # fmt: skip


def count(name: str, label: str, tooltip: str, most: int, step: int = 1) -> Any:
    """An advanced input of a whole number; 0 uses what suits the model."""
    return io.Int.Input(
        name, display_name=label, default=0, min=0, max=most, step=step, optional=True,
        tooltip=f"{tooltip} 0 uses the value that suits the model.", **ADVANCED,
    )  # fmt: skip


def token_inputs() -> list[Any]:
    """Return the advanced inputs for learning tokens."""
    return [
        count(
            "vectors",
            "vectors per concept",
            "How many word-sized pieces (token vectors) describe each concept. More hold more "
            "detail, and may make the rest of a prompt count less.",
            32,
        ),
        count(
            "resolution",
            "learning size (pixels)",
            "Pictures are resized to the area of a square with this side, in pixels. Lower it to "
            "save memory.",
            2048, 8,
        ),
        count(
            "batch",
            "samples per step",
            "How many noisy versions of a picture each step learns from, or fewer where memory does not "
            "suffice. Lower it to save memory.",
            8,
        ),
        number(
            "learning_rate",
            "token learning rate",
            "How fast the tokens change (their learning rate). Lower it if training is "
            "unstable, raise it if concepts are learned too slowly.",
        ),
        number(
            "attention_weight",
            "attention loss weight",
            "How strongly each token's attention is tied to its concept's mask (weight of "
            "the attention loss). Raise it if concepts bleed into each other.",
            10.0, 0.001,
        ),
        io.Float.Input(
            "end_of_text_weight", display_name="guard against overfitting (ViCo)",
            default=0.0, min=0.0, max=1.0, step=1e-5, round=False, optional=True,
            tooltip="Keeps each token's attention close to that of the prompt's end, which limits overfitting "
            "(ViCo's end-of-text regulariser). 0 is off; ViCo uses 0.0005.", **ADVANCED,
        ),
    ]  # fmt: skip


def mask_inputs() -> list[Any]:
    """Return the advanced inputs for finding masks."""
    return [
        count(
            "e_step_every",
            "update masks every (steps)",
            "How many training steps pass between updates of the masks. Lower it to update "
            "them more often, which takes longer.",
            1000,
        ),
        number(
            "threshold",
            "mask threshold (0 to 1)",
            "How strongly a spot must respond, from 0 to 1, to belong to a mask. Raise it for "
            "smaller masks.",
            1.0, 0.01,
        ),
        io.Boolean.Input(
            "otsu", display_name="automatic threshold (Otsu)", default=False, optional=True,
            tooltip="Choose the threshold automatically for each mask (Otsu's method). 'threshold' is then "
            "ignored.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "crf", display_name="follow edges (CRF)",
            options=[AUTO, "off", *PRESETS], default=AUTO, optional=True,
            tooltip="Makes the masks follow the picture's edges while learning (DenseCRF). 'auto' picks what "
            "suits the model, 'off' skips this step.", **ADVANCED,
        ),
        io.Boolean.Input(
            "flip", display_name="mirror at random", default=False, optional=True,
            tooltip="Mirror pictures at random while learning. Leave it off for asymmetric subjects, such as "
            "lettering.", **ADVANCED,
        ),
    ]  # fmt: skip


def joint_inputs() -> list[Any]:
    """Return the advanced inputs for the joint phase."""
    return [
        count("joint_steps", "joint steps", "How many training steps the joint phase takes.", 20000),
        number(
            "joint_learning_rate",
            "joint learning rate",
            "How fast the joint phase changes the model's weights (their learning "
            "rate). Lower it if pictures degrade.",
        ),
        count(
            "rank",
            "LoRA rank",
            "Size of the LoRA (its rank). Raise it to let the LoRA hold more detail, in a larger file.",
            128,
        ),
        io.Float.Input(
            "prior_weight", display_name="prior preservation weight",
            default=0.0, min=0.0, max=10.0, step=0.1, optional=True,
            tooltip="How strongly the joint phase is kept from forgetting what the model already knows (prior "
            "preservation). 0 is off; Break-a-Scene uses 1.", **ADVANCED,
        ),
    ]  # fmt: skip
