"""The node of the settings that few users change, and how nodes' inputs become the core's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..em_core.masks.crf import PRESETS
from ..em_core.presets import em_settings, joint_settings
from ..em_core.settings import EMSettings, JointSettings, Mode, WeightKind
from .automatic import AUTOMATIC, Number, checked, read
from .schema import CATEGORY, Settings, schema

Chosen = Mapping[str, Any]
"""What a Concept Settings node holds: the inputs that are not automatic, by id."""

MODES: dict[str, Mode] = {
    "find and improve": "em",
    "find once": "fixed",
    "given": "given",
    "none": "none",
}
"""Where masks come from, as nodes call it and as the core does."""
KINDS: dict[str, WeightKind] = {
    "nothing": "none",
    "LoRA": "lora",
    "cross-attention": "cross_attention",
    "all weights": "full",
}
"""What is trained after the tokens, as nodes call it and as the core does."""

TOKENS = {
    "vectors": Number(
        "vectors per concept",
        "How many word-sized pieces (token vectors) describe each concept. More hold more detail, and may make "
        "the rest of a prompt count less.",
        1, 32,
    ),
    "resolution": Number(
        "learning size (pixels)",
        "Pictures are resized to the area of a square with this side, in pixels. Lower it to save memory.",
        16, 4096,
    ),
    "batch": Number(
        "samples per step",
        "How many noisy versions of a picture each step learns from, or fewer where memory does not suffice. "
        "Lower it to save memory.",
        1, 64,
    ),
    "learning_rate": Number(
        "token learning rate",
        "How fast the tokens change (their learning rate). Lower it if training is unstable, raise it if "
        "concepts are learned too slowly.",
        1e-8, 1, whole=False,
    ),
    "attention_weight": Number(
        "attention loss weight",
        "How strongly each token's attention is tied to its concept's mask (weight of the attention loss). Raise "
        "it if concepts bleed into each other; 0 leaves it out.",
        0, 10, whole=False,
    ),
}  # fmt: skip
MASKS = {
    "e_step_every": Number(
        "update masks every (steps)",
        "How many training steps pass between updates of the masks. Lower it to update them more often, which "
        "takes longer. Once learning slows down, updates come less often.",
        1, 20000,
    ),
    "threshold": Number(
        "mask threshold (0 to 1)",
        "How strongly a spot must respond to belong to a mask. Raise it for smaller masks.",
        0.01, 1, whole=False,
    ),
}  # fmt: skip
JOINT = {
    "joint_steps": Number(
        "also train: steps",
        "How many training steps follow for what is also trained (the joint phase).",
        1, 20000,
    ),
    "joint_learning_rate": Number(
        "also train: learning rate",
        "How fast the model's weights change there (their learning rate). Lower it if pictures degrade.",
        1e-8, 1, whole=False,
    ),
    "rank": Number(
        "also train: LoRA rank",
        "Size of the LoRA (its rank). Raise it to let the LoRA hold more detail, in a larger file.",
        1, 128,
    ),
}  # fmt: skip
NUMBERS = TOKENS | MASKS | JOINT

EM_NAMES = {
    "learning_rate": "learning_rate",
    "batch": "batch",
    "vectors": "vectors",
    "attention_weight": "attention_weight",
    "end_of_text_weight": "end_of_text_weight",
    "flip": "flip",
    "e_step_every": "e_step_every",
    "resolution": "image_side",
}
JOINT_NAMES = {
    "joint_steps": "steps",
    "joint_learning_rate": "learning_rate",
    "rank": "rank",
    "prior_weight": "prior_weight",
}


class ConceptSettings(io.ComfyNode):
    """Hold what few users change, apart from Learn Concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptSettings",
            display_name="Concept Settings",
            category=CATEGORY,
            search_aliases=["learning rate", "training settings", "options", "advanced", "lora rank"],
            description="What Learn Concepts and Learn Visual Condition can be told beyond their own inputs. Leave "
            "what you do not need on 'automatic': it is what suits the model, and the node that learns says which "
            "value that was.",
            inputs=[
                *(number.input(name) for name, number in TOKENS.items()),
                *regularisers(),
                *(number.input(name) for name, number in MASKS.items()),
                *mask_choices(),
                *(number.input(name) for name, number in JOINT.items()),
                io.Float.Input(
                    "prior_weight", display_name="also train: keep what the model knows (0 is off)",
                    default=0.0, min=0.0, max=10.0, step=0.1, optional=True,
                    tooltip="How strongly the model is kept from forgetting what it already knows (weight of prior "
                    "preservation). 0 is off; Break-a-Scene uses 1.",
                ),
            ],
            outputs=[
                Settings.Output(
                    "settings", display_name="settings",
                    tooltip="Connect it to Learn Concepts or Learn Visual Condition.",
                )
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(  # type: ignore[override]
        cls,
        vectors: Any = None,
        resolution: Any = None,
        batch: Any = None,
        learning_rate: Any = None,
        attention_weight: Any = None,
        e_step_every: Any = None,
        threshold: Any = None,
        joint_steps: Any = None,
        joint_learning_rate: Any = None,
        rank: Any = None,
    ) -> bool | str:
        return checked(NUMBERS, locals())

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:  # type: ignore[override]
        chosen = {**{n: v for n, v in given.items() if n not in NUMBERS}, **read(NUMBERS, given)}
        return io.NodeOutput(chosen)


def regularisers() -> list[Any]:
    """Return the inputs that limit overfitting."""
    return [
        io.Float.Input(
            "end_of_text_weight", display_name="guard against overfitting (0 is off)",
            default=0.0, min=0.0, max=1.0, step=1e-5, round=False, optional=True,
            tooltip="Keeps each token's attention close to that of the prompt's end, which limits overfitting "
            "(weight of ViCo's end-of-text regulariser). 0 is off; ViCo uses 0.0005.",
        ),
        io.Boolean.Input(
            "flip", display_name="mirror at random", default=False, optional=True,
            tooltip="Mirror pictures at random while learning. Leave it off for asymmetric subjects, such as "
            "lettering.",
        ),
    ]  # fmt: skip


def mask_choices() -> list[Any]:
    """Return how masks are cut out."""
    return [
        io.Boolean.Input(
            "otsu", display_name="a threshold for each mask (Otsu)", default=False, optional=True,
            tooltip="Choose the threshold for each mask by itself (Otsu's method). 'mask threshold' is then "
            "ignored.",
        ),
        io.Combo.Input(
            "crf", display_name="follow edges (DenseCRF)",
            options=[AUTOMATIC, "off", *PRESETS], default=AUTOMATIC, optional=True,
            tooltip="Makes the masks follow the picture's edges while learning (DenseCRF). 'automatic' is what "
            "suits the model, 'off' leaves this out, the others are Refine Masks' presets.",
        ),
    ]  # fmt: skip


def em_of(family: str, mode: str, seed: int, chosen: Chosen) -> EMSettings:
    """Return the EM loop's settings: the family's defaults, and what was chosen.

    Args:
        mode: where masks come from, in the nodes' words.

    Raises:
        UserError: a value is out of range.
    """
    em = replace(em_settings(family), mode=MODES[mode], seed=seed, **renamed(chosen, EM_NAMES))
    masks, crf = em.masks, chosen.get("crf", AUTOMATIC)
    if crf != AUTOMATIC:
        masks = replace(masks, crf=None if crf == "off" else PRESETS[crf])
    if chosen.get("otsu"):
        masks = replace(masks, threshold="otsu")
    elif "threshold" in chosen:
        masks = replace(masks, threshold=chosen["threshold"])
    return replace(em, masks=masks)


def joint_of(family: str, kind: str, chosen: Chosen) -> JointSettings:
    """Return the joint phase's settings: the defaults of its kind, in the nodes' words, and what was chosen.

    Raises:
        UserError: a value is out of range.
    """
    return replace(joint_settings(family, KINDS[kind]), **renamed(chosen, JOINT_NAMES))


def renamed(chosen: Chosen, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what was chosen of these inputs, under the settings' names."""
    return {setting: chosen[name] for name, setting in names.items() if name in chosen}


def say_automatic(em: EMSettings, joint: JointSettings, side: int, chosen: Chosen) -> str:
    """A line with the values that stand for "automatic" in a run.

    Args:
        em, joint: the run's settings.
        side: of the model's own pictures, in pixels.
        chosen: what is not automatic.
    """
    values = {name: getattr(em, EM_NAMES[name]) for name in TOKENS}
    values["resolution"] = values["resolution"] or side
    if em.mode == "em":
        values["e_step_every"] = em.e_step_every
    if em.mode in ("em", "fixed"):
        values["threshold"] = em.masks.threshold
    if joint.kind != "none":
        values |= {"joint_steps": joint.steps, "joint_learning_rate": joint.weights_rate}
    if joint.kind == "lora":
        values["rank"] = joint.rank
    told = [f"{NUMBERS[n].label} {v:g}" for n, v in values.items() if is_automatic(n, v, chosen)]
    return f"Automatic: {', '.join(told)}." if told else ""


def is_automatic(name: str, value: Any, chosen: Chosen) -> bool:
    """Whether a number was left to what suits the model; Otsu's threshold is none."""
    return name not in chosen and not isinstance(value, str)
