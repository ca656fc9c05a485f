"""The nodes that save, load and export concept files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from safetensors.torch import save_file
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.files import write_aside
from ..em_core.prompts import require_apart
from ..em_core.runs.concept_set import ConceptSet
from .exports import embedding_tensors, lora_metadata, lora_tensors
from .schema import CATEGORY, Concepts, schema
from .telling import told_on_node

KIND = "visual_concepts"
SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])")
folder_paths.folder_names_and_paths.setdefault(
    KIND, ([str(Path(folder_paths.models_dir) / KIND)], {SUFFIX})
)


def require_name(name: str) -> str:
    """Return `name` if it is safe to use as a file name.

    Raises:
        UserError: it is empty, too long, holds anything but letters, digits, '_' and '-', or is reserved
            on Windows, which the message then says.
    """
    if RESERVED.fullmatch(name):
        raise UserError(
            f"Bad name {name!r}. Windows reserves it for a device, so no file can have it there. Choose "
            f"another name, such as {name}_1."
        )
    if not NAME.fullmatch(name):
        raise UserError(
            f"Bad name {name!r}. Expected up to 100 letters, digits, '_' or '-', as in rex_and_doll. Choose "
            "another name; it is used in prompts and as a file name."
        )
    return name


def folder_of(kind: str) -> Path:
    """Return the folder that files of this kind are written to."""
    return Path(folder_paths.get_folder_paths(kind)[0])


class SaveConcepts(io.ComfyNode):
    """Save a concept file and export its embeddings and LoRA as separate files."""

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
            description="Saves concepts for Load Concepts. It also exports them as embeddings (embedding:name "
            "in a prompt) and a LoRA, for use without this pack and in other programs.",
            is_output_node=True,
            inputs=[
                Concepts.Input("concepts", tooltip="The concepts to save, from Learn Concepts."),
                io.String.Input(
                    "name",
                    default="my_concepts",
                    tooltip="Name of the saved files: letters, digits, '_' and '-'. A single concept is "
                    "exported under this name, several are exported as name_concept each.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace existing files of the same name. When off, existing files are kept and "
                    "the node reports an error.",
                ),
                io.Boolean.Input(
                    "exports",
                    default=True,
                    tooltip="Also write the concepts to models/embeddings and any learned LoRA to "
                    "models/loras, for use without this pack.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="The embeddings' names, to paste into prompts elsewhere.",
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
    """Write the files and return the text to paste into prompts.

    Raises:
        UserError: the name is bad, a file of that name in any case exists, names of concepts differ only
            in case, or a folder cannot be written.
    """
    require_name(name)
    require_apart(concepts.names)
    embeddings = {
        export_name(name, concept, concepts): embedding_tensors(concepts, concept)
        for concept in concepts.names
    }
    lora = lora_tensors(concepts) if exports else {}
    files: dict[Path, Mapping[str, Tensor]] = {}
    if exports:
        folder = folder_of("embeddings")
        files = {folder / f"{export}{SUFFIX}": vectors for export, vectors in embeddings.items()}
    if lora:
        files[folder_of("loras") / f"{name}{SUFFIX}"] = lora
    target = folder_of(KIND) / f"{name}{SUFFIX}"
    require_free([target, *files], overwrite)
    for file, tensors in files.items():
        write_export(file, tensors, lora_metadata(concepts) if tensors is lora else {})
    concepts.save(target)
    return " ".join(f"embedding:{export}" for export in embeddings) if exports else ""


def export_name(name: str, concept: str, concepts: ConceptSet) -> str:
    """Return the embedding's name: the given one, followed by the concept's if there are several."""
    return name if len(concepts.names) == 1 else f"{name}_{concept}"


def require_free(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace files unasked, and to write next to one whose name differs only in case.

    Raises:
        UserError: a file is there, or on Windows and Macs its name would be that of one which is.
    """
    there = {file: in_any_case(file) for file in files}
    other = [str(found) for file, found in there.items() if found and found.name != file.name]
    if other and not all(file.exists() for file, found in there.items() if found):
        raise UserError(
            f"There is {', '.join(other)}, whose name differs only in upper and lower case, which Windows and "
            "Macs take for the same. Choose another name, or delete that file."
        )
    if not overwrite and any(there.values()):
        raise UserError(
            f"Files of this name already exist: {', '.join(str(found) for found in there.values() if found)}. "
            "Choose another name, or switch on 'overwrite'."
        )


def in_any_case(file: Path) -> Path | None:
    """Return the file of this name that is there, first of all in this case, or else in another."""
    if not file.parent.is_dir():
        return None
    names = sorted(other.name for other in file.parent.iterdir())
    same = [name for name in names if name.casefold() == file.name.casefold()]
    return file.parent / (file.name if file.name in same else same[0]) if same else None


def write_export(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a plain safetensors file, in full or not at all."""
    clean = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_aside(file, lambda aside: save_file(clean, aside, metadata=dict(metadata) or None))


class LoadConcepts(io.ComfyNode):
    """Load concepts from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadConcepts",
            display_name="Load Concepts",
            category=CATEGORY,
            search_aliases=["load embedding", "open concepts"],
            description="Loads concepts that were saved by Save Concepts or by `python -m em_core learn` "
            f"(put its concepts.safetensors into models/{KIND}).",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folder_paths.get_filename_list(KIND),
                    tooltip=f"A concept file in models/{KIND}.",
                )
            ],
            outputs=[
                Concepts.Output(
                    "concepts",
                    display_name="concepts",
                    tooltip="Connect them to Apply Concept Tokens or Extract Latent Masks.",
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
            return io.NodeOutput(
                ConceptSet.load(Path(folder_paths.get_full_path_or_raise(KIND, name)))
            )
