"""The node that saves pictures, masks and captions for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.exchange.datasets import Choices
from ..em_core.exchange.layouts import LAYOUTS, masks_of_run, read_words, save_dataset
from ..em_core.exchange.saving import numbered, require_name
from ..em_core.prompts import merge_concepts
from ..em_core.runs.concept_set import ConceptSet
from .files import why_bad_name
from .schema import CATEGORY, Concepts, Examples, schema
from .telling import on_node, told_on_node

FOLDER = "training_sets"


class SaveConceptTrainingSet(io.ComfyNode):
    """Save pictures, masks and captions in the layout of another trainer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SaveConceptTrainingSet",
            display_name="Save Training Set",
            category=CATEGORY,
            search_aliases=["dataset", "training data", "masked training", "kohya", "onetrainer"],
            description="Saves pictures, masks and captions as other trainers read them, for models that this pack "
            "does not learn on. The captions are the prompts with a trigger in each concept's place, without the "
            "words it started from, so that the trigger has to carry its looks.",
            is_output_node=True,
            inputs=[
                Examples.Input(
                    "examples", tooltip="The pictures and prompts, with masks if you have any."
                ),
                io.Combo.Input("layout", options=list(LAYOUTS), tooltip="Whose layout to save in."),
                io.String.Input(
                    "name",
                    default="my_set",
                    tooltip="Name of the folder, in output/training_sets; for ComfyUI's own nodes in "
                    "input/training_sets. It is numbered unless 'overwrite' is on.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Save under the name itself, without a number, and replace what is there.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Triggers for the captions, as in 'rex: sks, doll: ohwx doll'. Without one, a concept "
                    "has its own name.",
                ),
                io.Boolean.Input(
                    "apart",
                    display_name="each concept by itself",
                    default=False,
                    tooltip="Save pictures of each concept by itself, for a LoRA of one subject each.",
                ),
                io.Boolean.Input(
                    "crop",
                    display_name="crop to the concept",
                    default=False,
                    tooltip="With 'each concept by itself': cut them to the concept and a margin.",
                ),
                io.Boolean.Input(
                    "paint_out",
                    display_name="paint the others over",
                    default=False,
                    tooltip="With 'each concept by itself': fill the other concepts with a plain colour, for "
                    "trainers that read no masks.",
                ),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="What was learned from these examples: its masks are saved. Without it, the examples' "
                    "own masks are.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="Where the folder is, how it is used, and the captions.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:  # type: ignore[override]
        return why_bad_name(name) or True

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        examples: tuple[Example, ...],
        layout: str,
        name: str,
        overwrite: bool,
        words: str,
        apart: bool,
        crop: bool,
        paint_out: bool,
        concepts: ConceptSet | None = None,
    ) -> io.NodeOutput:
        if not examples:
            raise UserError("There are no examples to save. Connect a Concept Example.")
        folder = folder_of(layout, require_name(name), overwrite)
        names = [concept.name for concept in merge_concepts(e.prompt for e in examples)]
        choices = Choices(read_words(words, names), apart, crop, paint_out)
        with told_on_node() as told:
            masks = (
                [example.masks for example in examples]
                if concepts is None
                else masks_of_run(concepts, examples)
            )
            said = save_dataset(examples, masks, choices, layout, folder)
        return io.NodeOutput(said, ui=on_node(*told, said))


def folder_of(layout: str, name: str, overwrite: bool) -> Path:
    """Return the folder to write: ComfyUI's own nodes read data sets from its input folder."""
    of_comfyui = layout == "ComfyUI"
    root = folder_paths.get_input_directory() if of_comfyui else folder_paths.get_output_directory()
    parent = Path(root) / FOLDER
    return parent / (name if overwrite else numbered(name, [parent], suffix=""))
