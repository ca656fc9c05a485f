"""The node that learns a visual condition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.model.plans import AUTO, CHOICES
from ..em_core.presets import vico, visual_settings
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.settings import EMSettings, JointSettings, VisualSettings
from ..em_core.show.words import say_masks
from .ahead import require_masks
from .automatic import AUTOMATIC, Number, advanced_inputs, checked, read
from .host.families import identify
from .learn import FIND
from .learning.flow import Request, fulfil
from .results import finished, loss_map, mask_stack, with_masks
from .schema import CATEGORY, Concepts, Condition, Examples, LossMap, Settings, schema
from .settings import MODES, Chosen, em_of, renamed
from .telling import on_node, show_picture, told_on_node

SEVERAL, VICO = "several concepts", "one concept (ViCo)"
NUMBERS = {
    "em_steps": Number(
        "token steps",
        "How many training steps the tokens get before the blocks.",
        1, 20000,
    ),
    "learning_rate": Number(
        "learning rate",
        "How fast the blocks change (their learning rate).",
        1e-8, 1, whole=False,
    ),
    "token_learning_rate": Number(
        "token learning rate beside the blocks",
        "How fast the tokens change together with the blocks. With several concepts they are kept as they are "
        "unless you give a number.",
        1e-8, 1, whole=False,
    ),
}  # fmt: skip


class LearnVisualCondition(io.ComfyNode):
    """Learn image attention that looks at the examples' pictures while drawing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LearnVisualCondition",
            display_name="Learn Visual Condition",
            category=CATEGORY,
            search_aliases=[
                "vico",
                "image prompt",
                "reference image",
                "ip adapter",
                "train adapter",
            ],
            description="Learns to look at the examples' pictures while drawing, for details that a token (a new "
            "word) cannot carry. Each concept gets small blocks beside the model, which see the concept in its "
            "picture and act where it is drawn. A finished run is remembered and never trained twice; an "
            "interrupted run continues where it stopped.",
            inputs=[*main_inputs(), *advanced_inputs(NUMBERS)],
            outputs=[
                Condition.Output(
                    "condition",
                    display_name="condition",
                    tooltip="Connect it to Apply Visual Condition or Save Visual Condition.",
                ),
                Concepts.Output(
                    "learned",
                    display_name="concepts",
                    tooltip="The concepts as the condition knows them, for Apply Concept Tokens (with masks, say) "
                    "or Save Concepts.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="The mask of every concept in every example, in order.",
                ),
                LossMap.Output(
                    "loss",
                    display_name="loss",
                    tooltip="The training loss of every step. Connect it to Plot Loss Graph.",
                ),
                io.Image.Output(
                    "curves",
                    display_name="curves",
                    tooltip="A plot of the losses and of the masks' areas.",
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
    def validate_inputs(  # type: ignore[override]
        cls, em_steps: Any = None, learning_rate: Any = None, token_learning_rate: Any = None
    ) -> bool | str:
        return checked(NUMBERS, locals())

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        examples: tuple[Example, ...],
        method: str,
        masks: str,
        steps: int,
        seed: int,
        memory: str,
        concepts: ConceptSet | None = None,
        settings: Chosen | None = None,
        em_steps: str = AUTOMATIC,
        learning_rate: str = AUTOMATIC,
        token_learning_rate: str = AUTOMATIC,
    ) -> io.NodeOutput:
        if not examples:
            raise UserError("There are no examples to learn from. Connect a Concept Example.")
        own = read(NUMBERS, locals())
        models, chosen = identify(model, clip, vae), settings or {}
        em = em_of(models.family, masks, seed, chosen)
        em, visual = phases(em, models.family, method, steps, own, chosen)
        request = Request(models, tuple(examples), em, JointSettings(), memory, visual, concepts)
        if request.has_em and em.mode == "given":
            require_masks(examples)
        with told_on_node() as told:
            condition = fulfil(request)
        learned = condition.concepts
        found = with_masks(examples, learned)
        curves, picture = finished(found, learned, method != VICO)
        show_picture(picture)
        said = [*summary(learned, method != VICO), *told]
        return io.NodeOutput(
            condition,
            learned,
            mask_stack(found),
            loss_map(learned),
            curves,
            found,
            ui=on_node(*said, last_preview=picture),
        )


def summary(learned: ConceptSet, has_masks: bool) -> list[str]:
    """Return what came of a run, in lines for the node."""
    words = " and ".join(f"<{name}>" for name in learned.names)
    return [
        f"Masks: {say_masks(learned.masks)}." if has_masks else "",
        f"Write {words} in a prompt behind Apply Visual Condition.",
    ]


def phases(
    em: EMSettings, family: str, method: str, steps: int, own: Chosen, chosen: Chosen
) -> tuple[EMSettings, VisualSettings]:
    """Return the settings of both phases: the family's defaults with the nodes' inputs applied.

    Args:
        own: this node's numbers that are not automatic.
        chosen: those of a Concept Settings node.

    Raises:
        UserError: a value is out of range.
    """
    em = replace(em, **renamed(own, {"em_steps": "steps"}))
    visual = replace(visual_settings(family), steps=steps)
    if method == VICO:
        em, visual = vico(em, visual)
    names = ("learning_rate", "token_learning_rate")
    visual = replace(visual, **renamed(own, {name: name for name in names}))
    return em, replace(visual, **renamed(chosen, {"batch": "batch"}))


def main_inputs() -> list[Any]:
    """Return the inputs that most users set."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model to learn on, including any LoRAs and patches applied before this node. It is not "
            "changed.",
        ),
        io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint as the MODEL."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint as the MODEL."),
        Examples.Input(
            "examples", tooltip="The pictures and prompts to learn from, from Concept Example."
        ),
        io.Combo.Input(
            "method",
            options=[SEVERAL, VICO],
            default=SEVERAL,
            tooltip="several concepts: tokens and masks are found first (EM), then the blocks learn to look inside "
            "the masks, for any number of concepts. one concept (ViCo): the method as it was published, without "
            "masks.",
        ),
        io.Combo.Input(
            "masks",
            options=[words for words in MODES if words != "none"],
            default=FIND,
            tooltip="Where the masks come from. find and improve: found at the start and improved while the "
            "tokens learn (EM). find once: found at the start and kept. given: taken from the examples.",
        ),
        io.Int.Input(
            "steps",
            default=400,
            min=1,
            max=20000,
            tooltip="How many training steps the blocks get. Set 200 for the demo model.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Seed of everything random in the run.",
        ),
        io.Combo.Input(
            "memory",
            display_name="memory plan",
            options=CHOICES,
            default=AUTO,
            tooltip="How to spend the graphics card's memory, as in Learn Concepts. automatic goes by what is "
            "free.",
        ),
        Concepts.Input(
            "concepts",
            optional=True,
            tooltip="Concepts to start from, from Learn Concepts or Load Concepts. If they are all that the "
            "examples mark, their tokens stay as they are and only the blocks learn. A LoRA that was learned with "
            "them acts meanwhile.",
        ),
        Settings.Input(
            "settings",
            optional=True,
            tooltip="What few users change, from Concept Settings: all but its 'also train' counts here.",
        ),
    ]
