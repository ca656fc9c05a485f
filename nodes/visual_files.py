"""The nodes that save and load visual conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..em_core.exchange.saving import numbered, require_case, require_name
from ..em_core.runs.visual_condition import VisualCondition
from .files import SUFFIX, folder_of, why_bad_name
from .schema import CATEGORY, Condition, schema
from .telling import told_on_node

KIND = "visual_conditions"
folder_paths.folder_names_and_paths.setdefault(
    KIND, ([str(Path(folder_paths.models_dir) / KIND)], {SUFFIX})
)


class SaveVisualCondition(io.ComfyNode):
    """Save a visual condition as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SaveVisualCondition",
            display_name="Save Visual Condition",
            category=CATEGORY,
            search_aliases=["save vico", "save adapter"],
            description="Saves a visual condition, with its tokens and the pictures that it looks at, for Load "
            "Visual Condition.",
            is_output_node=True,
            inputs=[
                Condition.Input("condition", tooltip="From Learn Visual Condition."),
                io.String.Input(
                    "name",
                    default="my_condition",
                    tooltip="Name of the saved file: letters, digits, '_' and '-'. A number is put behind it if "
                    "there is such a file.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Save under the name itself, without a number, and replace what is there.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:  # type: ignore[override]
        return why_bad_name(name) or True

    @classmethod
    def execute(  # type: ignore[override]
        cls, condition: VisualCondition, name: str, overwrite: bool
    ) -> io.NodeOutput:
        folder, name = folder_of(KIND), require_name(name)
        name = name if overwrite else numbered(name, (folder,))
        file = folder / f"{name}{SUFFIX}"
        require_case([file])
        condition.save(file)
        return io.NodeOutput(ui={"text": [str(file)]})


class LoadVisualCondition(io.ComfyNode):
    """Load a visual condition from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadVisualCondition",
            display_name="Load Visual Condition",
            category=CATEGORY,
            search_aliases=["load vico", "load adapter"],
            description="Loads a visual condition that was saved by Save Visual Condition or by `python -m em_core "
            f"learn --visual` (put its condition.safetensors into models/{KIND}).",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(KIND),
                    tooltip=f"A file in models/{KIND}.",
                )
            ],
            outputs=[
                Condition.Output(
                    "condition",
                    display_name="condition",
                    tooltip="Connect it to Apply Visual Condition.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:  # type: ignore[override]
        """Change whenever the file does, so that new content under the same name is loaded."""
        status = Path(folder_paths.get_full_path_or_raise(KIND, name)).stat()
        return f"{name} {status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:  # type: ignore[override]
        with told_on_node():
            file = Path(folder_paths.get_full_path_or_raise(KIND, name))
            return io.NodeOutput(VisualCondition.load(file))
