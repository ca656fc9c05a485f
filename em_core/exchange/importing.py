"""Embeddings and LoRAs of other programs as concepts."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Notice, UserError
from ..files import read_safetensors, require_finite, tensor_copies
from ..model.identity import ModelIdentity
from ..prompts import NAME, Concept
from ..runs.concept_set import ConceptSet
from .describing import told_triggers
from .embeddings import family_of, read_embedding, shapes_of
from .pickles import refuse_pickle

LORA_FORMAT = "LoRA"
# What stands behind a layer's name in LoRA files of all kinds.
END = re.compile(
    r"(?:[._]lora)?[._](?:lora_(?:up|down|mid|[AB])|lora_linear_layer\.(?:up|down)|up|down|hada_\w+|lokr_\w+|oft_\w+|diff(?:_b)?|alpha|dora_scale"
    r"|[wb]_norm|set_weight|reshape_weight)(?:\.default)?(?:\.weight)?$"
)


def concept_of_embedding(
    path: Path, name: str = "", words: str = "", identity: ModelIdentity | None = None
) -> ConceptSet:
    """Return an embedding file as a concept.

    Args:
        path: a safetensors file of any program.
        name: of the concept; "" makes one from the file's.
        words: what the concept falls back to at strength 0.
        identity: of the model that it will be used with; None knows the family alone.

    Raises:
        UserError: the file is no embedding, or is of another family than `identity`.
    """
    vectors = read_embedding(path)
    widths = {encoder: v.shape[1] for encoder, v in vectors.items()}
    if identity is not None and dict(identity.encoders) != widths:
        raise UserError(
            f"{path} is of a different family of models. Expected vectors of {dict(identity.encoders)}, got "
            f"{widths}. Use one that was made for this model's family."
        )
    found = identity or unknown_model(family_of(vectors), widths)
    return imported(path, name or name_from(path), words, vectors, {}, found)


def imported(
    path: Path,
    name: str,
    words: str,
    vectors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    identity: ModelIdentity,
) -> ConceptSet:
    """Return a concept with the vectors and weights of a file."""
    concept = Concept(name, " ".join(words.split()))
    settings = {"imported": path.name}
    return ConceptSet((concept,), {name: dict(vectors)}, identity, weights, settings=settings)


def unknown_model(family: str, widths: Mapping[str, int]) -> ModelIdentity:
    """Return the identity of a model of which only the family is known."""
    return ModelIdentity(family, "", dict(widths), torch.zeros(0))


def name_from(path: Path) -> str:
    """Return a concept's name made from a file's.

    Raises:
        UserError: nothing is left of it.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem).strip("_")[:64]
    if not NAME.fullmatch(name):
        raise UserError(
            f"The file name {path.name!r} gives no name for a concept. Name the concept, as in rex: a letter, then "
            "letters, digits, '_' or '-'."
        )
    return name


def trigger_words(path: Path, name: str, words: str) -> str:
    """Return the trigger words of a LoRA file's concept: the given ones, or those that the file tells.

    Files of this package tell them, for each concept that is in them; those of other programs do not.

    Args:
        path: the file.
        name: of the concept that it is to become.
        words: what the user says; "" takes what the file tells.

    Raises:
        UserError: the file says otherwise, or tells of several concepts and none is chosen.
    """
    told = told_triggers(path)
    if told is None:
        return words
    phrases = {concept: " ".join(of) for concept, of in told.items()}
    if not phrases:
        warnings.warn(
            f"{path.name} holds what was learned of the model's weights, without the tokens. Take the export that "
            "has both, or the concepts file itself.",
            Notice,
            stacklevel=2,
        )
        return words
    listed = " and ".join(f"{phrase!r} for {concept}" for concept, phrase in phrases.items())
    given, concept = " ".join(words.lower().split()), name.strip()
    if not given and (concept in phrases or len(phrases) == 1):
        return phrases.get(concept, next(iter(phrases.values())))
    if not given:
        raise UserError(
            f"{path.name} holds several concepts. Its trigger words are {listed}. Give those of one concept, or "
            "take its name."
        )
    meant = [one for one, phrase in phrases.items() if f" {phrase} " in f" {given} "]
    if not meant or (concept in phrases and concept not in meant):
        raise UserError(
            f"{words!r} are not the trigger words of {concept} in {path.name}. The file says that they are "
            f"{listed}. Use these, or leave the words out."
        )
    return words


def read_lora(path: Path, name: str, words: str) -> dict[str, Tensor]:
    """Return a LoRA file's tensors, if there is a name and trigger words to use it by.

    Raises:
        UserError: one of them is missing, or the file is a pickle, damaged, or holds no LoRA.
    """
    refuse_pickle(path)
    if not name.strip() or not words.strip():
        raise UserError(
            f"{path.name} is a LoRA, which does not tell what it is of. Expected a name for the concept and the "
            "LoRA's trigger words, as in rex and 'sks dog'. Its page says which words those are."
        )
    _, tensors = read_safetensors(path, LORA_FORMAT, tensor_copies)
    if not any(layer_of(key) != key for key in tensors):
        some = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise UserError(
            f"{path} holds no LoRA. Expected layers with lora_up and lora_down, got {some}. Choose a LoRA file."
        )
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    require_finite(path, floats)
    return tensors


def holds_lora(path: Path) -> bool:
    """Return whether a safetensors file has names as LoRAs have them.

    Raises:
        UserError: it does not exist or is not safetensors.
    """
    return any(layer_of(name) != name for name in shapes_of(path))


def layer_of(key: str) -> str:
    """Return the name of the layer that a tensor of a LoRA file belongs to."""
    return END.sub("", key)
