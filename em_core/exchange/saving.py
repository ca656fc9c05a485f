"""Saving concepts as files of other programs: which files there are, under which free name."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import Notice, UserError
from ..files import order_metadata, own_copy, write_together
from ..prompts import require_apart
from ..runs.concept_set import ConceptSet
from .describing import (
    embedding_metadata,
    for_comfyui,
    for_embeddings,
    for_others,
    lora_metadata,
    triggers_in_use,
)
from .embeddings import embedding_tensors
from .lora import for_others as tensors_for_others
from .lora import lora_tensors, with_tokens
from .triggers import (
    RARE,
    Triggers,
    Vocabularies,
    choose_triggers,
    common_words,
    read_triggers,
)

SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])")
RANK = 64


@dataclass(frozen=True)
class Export:
    """A plain safetensors file to write."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Exports:
    """The files that concepts are exported as.

    Attributes:
        loras, embeddings: file name without suffix -> what it holds.
        triggers: the trigger words of the tokens in the LoRA; empty if there are none in it.
        guide: which file goes where, and what to write in prompts.
    """

    loras: Mapping[str, Export]
    embeddings: Mapping[str, Export]
    triggers: Triggers
    guide: str

    def files(self, loras: Path, embeddings: Path) -> dict[Path, Export]:
        """Return the files by the paths that they get in these folders."""
        found = {loras / f"{name}{SUFFIX}": export for name, export in self.loras.items()}
        return found | {embeddings / f"{n}{SUFFIX}": one for n, one in self.embeddings.items()}


def exports_of(
    concepts: ConceptSet,
    name: str,
    vocabularies: Vocabularies | None = None,
    named: str = "",
    taken: Mapping[str, str] | None = None,
    rank: int = RANK,
) -> Exports:
    """Return concepts as files of other programs.

    Args:
        concepts: the concepts.
        name: of the LoRA for ComfyUI; the other names are made from it.
        vocabularies: of the model's text encoders; without them, no LoRA holds the tokens.
        named: trigger words that the user wants, see :func:`read_triggers`.
        taken: trigger word -> concept, in other files.
        rank: of the factors of changed weights, in the file for other programs.

    Raises:
        UserError: the trigger words cannot be used, or the text encoders are of another family.
    """
    names, family = concepts.names, concepts.identity.family
    embeddings = {embedding_name(name, concept, names, family): concept for concept in names}
    triggers: Triggers = {}
    if vocabularies is not None:
        require_widths(concepts, vocabularies)
        wanted = read_triggers(named, concepts.names)
        triggers = choose_triggers(concepts.vectors, vocabularies, wanted, taken or {})
    guides = []
    loras = {}
    if vocabularies is not None or concepts.weights:
        guides.append(for_comfyui(name, triggers))
        tensors = (
            with_tokens(concepts, triggers, vocabularies)
            if vocabularies is not None
            else lora_tensors(concepts)
        )
        loras[name] = Export(tensors, lora_metadata(concepts, triggers, guides[-1]))
    if concepts.weights:
        tensors, cut = tensors_for_others(concepts, rank)
        guides.append(for_others(f"{name}_lora", embeddings, cut.error, rank))
        loras[f"{name}_lora"] = Export(tensors, lora_metadata(concepts, {}, guides[-1]))
    guides.append(for_embeddings(embeddings))
    exported = {
        file: Export(
            embedding_tensors(concepts, concept),
            embedding_metadata(concepts.identity.family, concept, for_embeddings({file: concept})),
        )
        for file, concept in embeddings.items()
    }
    return Exports(loras, exported, triggers, "\n".join(guides))


def embedding_name(name: str, concept: str, names: Sequence[str], family: str) -> str:
    """Return an embedding's name: the given one, the concept's if there are several, and the family."""
    of_one = name if len(names) == 1 else f"{name}_{concept}"
    return f"{of_one}_{family}"


def require_widths(concepts: ConceptSet, vocabularies: Vocabularies) -> None:
    """Refuse text encoders of another family than the one that the concepts were learned on.

    Raises:
        UserError: names or widths differ.
    """
    ours = {encoder: v.table.shape[1] for encoder, v in vocabularies.items()}
    if ours != dict(concepts.identity.encoders):
        raise UserError(
            f"The concepts do not fit these text encoders. Expected {dict(concepts.identity.encoders)}, got "
            f"{ours}. Use the model that they were learned on."
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


def numbered(name: str, folders: Iterable[Path], suffix: str = SUFFIX) -> str:
    """Return the name with a number that no file in these folders has yet, from 1: `rex_00001`."""
    of_name = re.compile(rf"{re.escape(name)}_(\d{{5,}})(?:_.*)?{re.escape(suffix)}", re.IGNORECASE)
    files = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
    found = [int(match[1]) for file in files if (match := of_name.fullmatch(file))]
    return f"{name}_{max(found, default=0) + 1:05}"


def save_exports(
    concepts: ConceptSet,
    name: str,
    loras: Path,
    embeddings: Path,
    vocabularies: Vocabularies | None = None,
    named: str = "",
    rank: int = RANK,
) -> Exports:
    """Write all files of :func:`exports_of`, or none of them.

    Raises:
        UserError: see :func:`exports_of`; a file's name differs from another's only in case, names of
            concepts do, or a folder cannot be written to.
    """
    require_apart(concepts.names)
    own = {loras / f"{name}{SUFFIX}"}
    taken = triggers_in_use(sorted(set(loras.glob(f"*{SUFFIX}")) - own))
    exports = exports_of(concepts, name, vocabularies, named, taken, rank)
    files = exports.files(loras, embeddings)
    require_case(list(files))
    warn_of(exports.triggers, vocabularies or {}, taken)
    write_together({path: partial(write_export, export) for path, export in files.items()})
    return exports


def warn_of(triggers: Triggers, vocabularies: Vocabularies, taken: Mapping[str, str]) -> None:
    """Say which trigger words mean something else already: in another file, or to everyone."""
    for concept, words in triggers.items():
        for word in words:
            other = taken.get(word, concept)
            if other != concept:
                warnings.warn(
                    f"The trigger word {word} means {other} in another file of this folder: do not load both at a "
                    "time, or choose another word.",
                    Notice,
                    stacklevel=3,
                )
    if common := common_words(triggers, vocabularies):
        warnings.warn(
            f"The trigger word {', '.join(common)} is a common one, and changes wherever it stands in a prompt. A "
            f"rare one does not, such as {RARE[0]}.",
            Notice,
            stacklevel=3,
        )


def write_export(export: Export, path: Path) -> None:
    clean = {name: own_copy(tensor.detach()) for name, tensor in export.tensors.items()}
    save_file(clean, path, metadata=dict(export.metadata))
    order_metadata(path)


def require_case(files: Sequence[Path]) -> None:
    """Refuse names that differ from those of files which are there in upper and lower case alone.

    Raises:
        UserError: on Windows and Macs such a file would be overwritten.
    """
    there = {file: in_any_case(file) for file in files}
    other = [str(found) for file, found in there.items() if found and found.name != file.name]
    if other and not all(file.exists() for file, found in there.items() if found):
        raise UserError(
            f"There is {', '.join(other)}, whose name differs only in upper and lower case, which Windows and "
            "Macs take for the same. Choose another name, or delete that file."
        )


def in_any_case(file: Path) -> Path | None:
    """Return the file of this name that is there, first of all in this case, or else in another."""
    if not file.parent.is_dir():
        return None
    names = sorted(other.name for other in file.parent.iterdir())
    same = [name for name in names if name.casefold() == file.name.casefold()]
    return file.parent / (file.name if file.name in same else same[0]) if same else None
