"""Concept files, and their exports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from safetensors.torch import save_file
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.files import write_aside
from ..em_core.runs.concept_set import ConceptSet
from .exports import embedding_tensors, lora_metadata, lora_tensors
from .schema import CATEGORY, Concepts, schema

KIND = "visual_concepts"
SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)")
folder_paths.folder_names_and_paths.setdefault(
    KIND, ([str(Path(folder_paths.models_dir) / KIND)], {SUFFIX})
)


def require_name(name: str) -> str:
    """A name that makes a file in the right folder and nothing else.

    Raises:
        UserError: it is empty, or holds anything but letters, digits, '_' and '-'.
    """
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name):
        raise UserError(
            f"Bad name {name!r}. Expected letters, digits, '_' or '-', at most 100, as in rex_and_doll: "
            "the name is used in prompts and for files."
        )
    return name


def folder_of(kind: str) -> Path:
    """Where files of a kind are written."""
    return Path(folder_paths.get_folder_paths(kind)[0])


class SaveConcepts(io.ComfyNode):
    """A concept file, and the embeddings and the LoRA in it as files of their own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="SaveConcepts",
            display_name="Save Concepts",
            category=CATEGORY,
            search_aliases=[
                "export embedding",
                "save embedding",
                "export lora",
                "save textual inversion",
            ],
            description="Saves concepts for Load Concepts and, for use without this pack and in other programs, as "
            "embeddings (embedding:name in a prompt) and a LoRA.",
            is_output_node=True,
            inputs=[
                Concepts.Input("concepts", tooltip="From Learn Concepts."),
                io.String.Input(
                    "name",
                    default="my_concepts",
                    tooltip="Letters, digits, '_' and '-'. One concept is exported under this name; several as "
                    "name_concept each.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace files of the same name. Off: refuse.",
                ),
                io.Boolean.Input(
                    "exports",
                    default=True,
                    tooltip="Also write models/embeddings and models/loras.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="To paste into prompts elsewhere."
                )
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls, concepts: ConceptSet, name: str, overwrite: bool, exports: bool
    ) -> io.NodeOutput:
        text = save_concepts(concepts, name, overwrite, exports)
        return io.NodeOutput(text, ui={"text": [text]})


def save_concepts(concepts: ConceptSet, name: str, overwrite: bool, exports: bool) -> str:
    """Write the files; gives the text to paste.

    Raises:
        UserError: a bad name, a file that exists, or a folder that cannot be written.
    """
    require_name(name)
    embeddings = {
        export_name(name, c, concepts): embedding_tensors(concepts, c) for c in concepts.names
    }
    lora = lora_tensors(concepts) if exports else {}
    files: dict[Path, Mapping[str, Tensor]] = {}
    if exports:
        files = {folder_of("embeddings") / f"{n}{SUFFIX}": of for n, of in embeddings.items()}
    if lora:
        files[folder_of("loras") / f"{name}{SUFFIX}"] = lora
    target = folder_of(KIND) / f"{name}{SUFFIX}"
    there = [str(file) for file in (target, *files) if file.exists()]
    if there and not overwrite:
        raise UserError(
            f"There is already {', '.join(there)}. Choose another name, or switch on 'overwrite'."
        )
    for file, tensors in files.items():
        write_export(file, tensors, lora_metadata(concepts) if tensors is lora else {})
    concepts.save(target)
    return " ".join(f"embedding:{n}" for n in embeddings) if exports else ""


def export_name(name: str, concept: str, concepts: ConceptSet) -> str:
    """The embedding's name: the given one, with the concept's where there are several."""
    return name if len(concepts.names) == 1 else f"{name}_{concept}"


def write_export(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write plain safetensors, whole or not at all."""
    clean = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_aside(file, lambda aside: save_file(clean, aside, metadata=dict(metadata) or None))


class LoadConcepts(io.ComfyNode):
    """Concepts from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadConcepts",
            display_name="Load Concepts",
            category=CATEGORY,
            search_aliases=["load embedding", "open concepts"],
            description="Concepts that Save Concepts wrote, or `python -m em_core learn` "
            f"(put its concepts.safetensors into models/{KIND}).",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(KIND),
                    tooltip=f"A file in models/{KIND}.",
                )
            ],
            outputs=[
                Concepts.Output(
                    "concepts",
                    display_name="concepts",
                    tooltip="For Apply Concept Tokens and Extract.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:  # type: ignore[override]
        """Another content under the same name is another input."""
        status = Path(folder_paths.get_full_path_or_raise(KIND, name)).stat()
        return f"{name} {status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:  # type: ignore[override]
        return io.NodeOutput(ConceptSet.load(Path(folder_paths.get_full_path_or_raise(KIND, name))))
