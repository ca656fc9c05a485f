"""Learning concepts and their masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.masks.crf import PRESETS
from ..em_core.presets import em_settings, joint_settings
from ..em_core.settings import EMSettings, JointSettings
from .host.families import identify
from .learning.flow import Request, fulfil
from .learning.plans import CHOICES
from .results import curves_image, loss_map, mask_stack
from .schema import ADVANCED, CATEGORY, Concepts, Examples, LoraModel, LossMap, schema

AUTO = "auto"


class LearnConcepts(io.ComfyNode):
    """The EM loop, and the joint phase after it."""

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
            description="Learns a token for every concept in the examples' prompts, and finds each concept's mask, "
            "without masks being painted. A run that was finished once is found again and never trained twice; "
            "one that was interrupted goes on where it stopped.",
            inputs=[*main_inputs(), *advanced_inputs()],
            outputs=[
                Concepts.Output(
                    "concepts", display_name="concepts", tooltip="For Apply, Save and Extract."
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="Every concept of every example, in order.",
                ),
                LoraModel.Output(
                    "lora",
                    display_name="lora",
                    tooltip="The joint phase's weights; empty without one.",
                ),
                LossMap.Output("loss", display_name="loss", tooltip="For Plot Loss Graph."),
                io.Image.Output("curves", display_name="curves", tooltip="Losses, areas, and IoU."),
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
            raise UserError("No example to learn from. Connect a Concept Example.")
        models = identify(model, clip, vae)
        em, joint_phase = settings_of(models.family, mode, steps, seed, joint, advanced)
        concepts = fulfil(Request(models, tuple(examples), em, joint_phase, memory))
        from .exports import lora_tensors

        return io.NodeOutput(
            concepts,
            mask_stack(concepts, examples),
            lora_tensors(concepts),
            loss_map(concepts),
            curves_image(concepts),
        )


def settings_of(
    family: str, mode: str, steps: int, seed: int, kind: str, advanced: dict[str, Any]
) -> tuple[EMSettings, JointSettings]:
    """Both phases' settings: what suits the family, changed as asked; 0 and "auto" leave it.

    Raises:
        UserError: a value out of its range.
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
    """The inputs that are not 0, under the settings' names."""
    return {of: advanced[name] for name, of in names.items() if advanced.get(name)}


def masks_settings(em: EMSettings, advanced: dict[str, Any]) -> Any:
    """How attention becomes masks."""
    masks, crf = em.masks, advanced.get("crf", AUTO)
    if crf != AUTO:
        masks = replace(masks, crf=None if crf == "off" else PRESETS[crf])
    if advanced.get("otsu"):
        return replace(masks, threshold="otsu")
    return replace(masks, threshold=advanced["threshold"]) if advanced.get("threshold") else masks


def main_inputs() -> list[Any]:
    """What most users choose."""
    return [
        io.Model.Input(
            "model", tooltip="Learned on as it is here, with LoRAs and patches before it."
        ),
        io.Clip.Input("clip", tooltip="From the same checkpoint as the MODEL."),
        io.Vae.Input("vae", tooltip="From the same checkpoint as the MODEL."),
        Examples.Input("examples", tooltip="From Concept Example."),
        io.Combo.Input(
            "mode",
            options=["em", "fixed", "given", "none"],
            default="em",
            tooltip="em: find masks while learning. fixed: find them once at the start. given: use the examples' "
            "masks. none: no masks, plain textual inversion.",
        ),
        io.Int.Input(
            "steps",
            default=400,
            min=1,
            max=20000,
            tooltip="Steps of learning tokens (demo model: 120).",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Of all randomness.",
        ),
        io.Combo.Input(
            "joint",
            options=["none", "lora", "cross_attention", "full"],
            default="none",
            tooltip="After the tokens, learn weights too: none (tokens only, smallest), a LoRA, keys and values of "
            "cross-attention, or everything.",
        ),
        io.Combo.Input(
            "memory",
            options=CHOICES,
            default="auto",
            tooltip="What the graphics card has. 24 GB: float32, every joint phase. 12 GB: bfloat16, tokens and "
            "LoRA. 8 GB: the same, activations computed twice. At most 8, 4 and 1 samples a step.",
        ),
    ]


def advanced_inputs() -> list[Any]:
    """What few users need; 0 or auto means what suits the model."""

    def number(name: str, tooltip: str, most: float = 1.0, step: float = 1e-6) -> Any:
        return io.Float.Input(
            name, default=0.0, min=0.0, max=most, step=step, round=False, optional=True,
            tooltip=f"{tooltip} 0: what suits the model.", **ADVANCED,
        )  # fmt: skip

    def count(name: str, tooltip: str, most: int, step: int = 1) -> Any:
        return io.Int.Input(
            name, default=0, min=0, max=most, step=step, optional=True,
            tooltip=f"{tooltip} 0: what suits the model.", **ADVANCED,
        )  # fmt: skip

    return [
        count("vectors", "Token vectors per concept.", 32),
        count("resolution", "Side of the square whose area pictures are resized to.", 2048, 8),
        count("batch", "Noise samples per step, as far as the memory preset allows.", 8),
        number("learning_rate", "Learning rate of the tokens."),
        number("attention_weight", "Weight of the attention loss.", 10.0, 0.001),
        io.Float.Input(
            "end_of_text_weight", default=0.0, min=0.0, max=1.0, step=1e-5, round=False, optional=True,
            tooltip="Weight of ViCo's end-of-text regulariser (ViCo: 0.0005).", **ADVANCED,
        ),
        count("e_step_every", "Steps between estimates of the masks.", 1000),
        number("threshold", "What an attention map must exceed, 0 to 1.", 1.0, 0.01),
        io.Boolean.Input(
            "otsu", default=False, optional=True, tooltip="Choose the threshold by Otsu's method.", **ADVANCED
        ),
        io.Combo.Input(
            "crf", options=[AUTO, "off", *PRESETS], default=AUTO, optional=True,
            tooltip="DenseCRF that refines the masks while learning.", **ADVANCED,
        ),
        io.Boolean.Input(
            "flip", default=False, optional=True,
            tooltip="Mirror pictures at random. Wrong for asymmetric subjects.", **ADVANCED,
        ),
        count("joint_steps", "Steps of the joint phase.", 20000),
        number("joint_learning_rate", "Learning rate of the joint phase's weights."),
        count("rank", "Rank of the LoRA.", 128),
        io.Float.Input(
            "prior_weight", default=0.0, min=0.0, max=10.0, step=0.1, optional=True,
            tooltip="Prior preservation in the joint phase (Break-a-Scene: 1).", **ADVANCED,
        ),
    ]  # fmt: skip
