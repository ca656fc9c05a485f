"""The nodes that save, load and export concept files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..em_core.exchange.importing import concept_of_embedding
from ..em_core.exchange.saving import (
    RANK,
    SUFFIX,
    numbered,
    require_case,
    require_name,
    save_exports,
)
from ..em_core.exchange.triggers import Vocabularies
from ..em_core.prompts import require_apart
from ..em_core.runs.concept_set import ConceptSet
from .automatic import why_not
from .host.application import require_same_family
from .host.imports import concept_of_lora
from .host.text import vocabularies
from .schema import ADVANCED, CATEGORY, Concepts, schema
from .telling import on_node, told_on_node

KIND = "visual_concepts"
OTHERS = ("embeddings", "loras")
folder_paths.folder_names_and_paths.setdefault(
    KIND, ([str(Path(folder_paths.models_dir) / KIND)], {SUFFIX})
)


def folder_of(kind: str) -> Path:
    """Return the folder that files of this kind are written to."""
    return Path(folder_paths.get_folder_paths(kind)[0])


def why_bad_name(name: Any) -> str:
    """Return what is wrong with the name of a file to save; empty if nothing is, or if it is linked."""
    return why_not(require_name, name) if isinstance(name, str) else ""


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
                "trigger word",
            ],
            description="Saves concepts for Load Concepts, and as files that need no node of this pack: with a "
            "CLIP connected, one LoRA with the tokens in it, which Load LoRA (Model and CLIP) loads and a plain "
            "trigger word calls; embeddings (embedding:name in a prompt); and, where weights were learned, a LoRA "
            "without tokens for diffusers, A1111 and kohya. The node says which file goes where.",
            is_output_node=True,
            inputs=[
                Concepts.Input("concepts", tooltip="The concepts to save, from Learn Concepts."),
                io.String.Input(
                    "name",
                    default="my_concepts",
                    tooltip="Name of the saved files: letters, digits, '_' and '-'. They are numbered, as in "
                    "my_concepts_00001, unless 'overwrite' is on. Embeddings also have the concept's name, if "
                    "there are several, and the model's family.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Save under the name itself, without a number, and replace what is there.",
                ),
                io.Boolean.Input(
                    "exports",
                    default=True,
                    tooltip="Also write LoRAs to models/loras and embeddings to models/embeddings, for use without "
                    "this pack.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the checkpoint to draw with. With it, the LoRA holds the tokens: a "
                    "trigger word in a plain prompt then means the concept. They are exact on this checkpoint; on "
                    "another one they are off by as much as its trigger word differs.",
                ),
                io.String.Input(
                    "triggers",
                    default="",
                    optional=True,
                    tooltip="Trigger words of your own, as in 'rex: sks, doll: ohwx olis': one for each vector of "
                    "a concept, and each a single piece of CLIP's vocabulary. Empty: rare ones are chosen, and the "
                    "node says which. At strength 0 a trigger word means what it meant before, unlike in Apply "
                    "Concept Tokens, where 0 is the words that the concept started from.",
                ),
                io.Int.Input(
                    "rank",
                    default=RANK,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="Of the LoRA for other programs, where whole weights were learned (cross-attention "
                    "or all weights): their change at this rank. The node says how much of it is left "
                    "out. The LoRA for ComfyUI has the whole change.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.String.Output(
                    "text",
                    display_name="text",
                    tooltip="Which file goes where, what each trigger word means, and the embeddings' names.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:  # type: ignore[override]
        return why_bad_name(name) or True

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        concepts: ConceptSet,
        name: str,
        overwrite: bool,
        exports: bool,
        clip: Any = None,
        triggers: str = "",
        rank: int = RANK,
    ) -> io.NodeOutput:
        with told_on_node() as told:
            text = save_concepts(concepts, name, overwrite, exports, clip, triggers, rank)
        return io.NodeOutput(text, ui=on_node(*told, text))


def save_concepts(
    concepts: ConceptSet,
    name: str,
    overwrite: bool,
    exports: bool,
    clip: Any = None,
    triggers: str = "",
    rank: int = RANK,
) -> str:
    """Write the files and return the text that says which goes where.

    Raises:
        UserError: the name or a trigger word is bad, a file's name differs from another's only in case,
            names of concepts do, the CLIP is of another family, or a folder cannot be written.
    """
    require_name(name)
    require_apart(concepts.names)
    loras, embeddings, own = (folder_of(kind) for kind in ("loras", "embeddings", KIND))
    name = name if overwrite else numbered(name, (loras, embeddings, own))
    target = own / f"{name}{SUFFIX}"
    require_case([target])
    guide = f"{name}: for Load Concepts."
    if exports:
        words = None if clip is None else clip_vocabularies(concepts, clip)
        saved = save_exports(concepts, name, loras, embeddings, words, triggers, rank)
        guide = f"{saved.guide}\n{guide}"
    concepts.save(target)
    return guide


def clip_vocabularies(concepts: ConceptSet, clip: Any) -> Vocabularies:
    """Return the vocabularies of a CLIP that the concepts fit.

    Raises:
        UserError: it is of another family.
    """
    require_same_family(concepts, clip)
    return vocabularies(clip, concepts.identity.encoders)


class LoadConcepts(io.ComfyNode):
    """Load concepts from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadConcepts",
            display_name="Load Concepts",
            category=CATEGORY,
            search_aliases=["load embedding", "open concepts", "import lora", "textual inversion"],
            description="Loads concepts that were saved by Save Concepts or by `python -m em_core learn` (put its "
            f"concepts.safetensors into models/{KIND}). It also takes embeddings and LoRAs of other programs as a "
            "concept: to find its masks in pictures, or to give it a place in a layout.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[
                        *folder_paths.get_filename_list(KIND),
                        *(
                            f"{kind}/{n}"
                            for kind in OTHERS
                            for n in folder_paths.get_filename_list(kind)
                        ),
                    ],
                    tooltip=f"A concept file in models/{KIND}, or an embedding or LoRA of another program in "
                    "models/embeddings or models/loras.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    optional=True,
                    tooltip="For an embedding or a LoRA: the name of the concept, to be written as <name> in "
                    "prompts. Empty: made from an embedding's file name.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="For a LoRA: its trigger words, as its page tells them; empty for one that Save "
                    "Concepts wrote with a CLIP. For an embedding: what it falls back to at strength 0, if "
                    "anything.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For a LoRA: the MODEL of the checkpoint to use it with.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For a LoRA: the CLIP of the checkpoint to use it with.",
                ),
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
    def fingerprint_inputs(cls, name: str, **others: Any) -> str:  # type: ignore[override]
        """Change whenever the file does, so that new content under the same name is loaded."""
        status = located(name)[1].stat()
        return f"{name} {status.st_mtime_ns} {status.st_size}"

    @classmethod
    def execute(  # type: ignore[override]
        cls, name: str, concept: str = "", words: str = "", model: Any = None, clip: Any = None
    ) -> io.NodeOutput:
        kind, path = located(name)
        with told_on_node() as told:
            if kind == "embeddings":
                loaded = concept_of_embedding(path, concept.strip(), words)
            elif kind == "loras":
                loaded = concept_of_lora(path, concept, words, model, clip)
            else:
                loaded = ConceptSet.load(path)
        names = " and ".join(f"<{name}>" for name in loaded.names)
        return io.NodeOutput(loaded, ui=on_node(f"Holds {names}.", *told))


def located(name: str) -> tuple[str, Path]:
    """Return the kind of a file that LoadConcepts offers, and its path."""
    kind, _, rest = name.partition("/")
    if kind in OTHERS and folder_paths.get_full_path(KIND, name) is None:
        return kind, Path(folder_paths.get_full_path_or_raise(kind, rest))
    return KIND, Path(folder_paths.get_full_path_or_raise(KIND, name))
