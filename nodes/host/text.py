"""Concepts in ComfyUI's prompts: a tokenizer that knows them, and where they stand."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management as mm
import torch
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.exchange.triggers import Vocabulary
from ...em_core.model.vectors import spread_pieces
from ...em_core.prompts import MARK, NAME, ConceptVectors, require_no_loader

MEMORY = "\x1a"
Tokens = dict[str, list[list[tuple[Any, float]]]]


class ConceptTokens:
    """A mixin that makes ComfyUI's tokenizers read `<name>` and `<name:words>` as a concept's vectors.

    A mark becomes an `embedding:` with a name that no file can have, so that ComfyUI's own code
    handles weights, commas, several vectors and long prompts.
    """

    concepts: Mapping[str, Tensor]

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        return super().tokenize_with_weights(MARK.sub(self.replace_mark, text), *args, **kwargs)  # type: ignore[misc]

    def replace_mark(self, mark: Any) -> str:
        name = mark[1].partition(":")[0].strip()
        if name in self.concepts:
            return f" embedding:{MEMORY}{name} "
        return refuse_unknown(mark[0], name, self.concepts)

    def _try_get_embedding(self, embedding_name: str) -> Any:
        found = super()._try_get_embedding(embedding_name)  # type: ignore[misc]
        first = embedding_name.split()[0] if embedding_name.split() else ""
        if not first.startswith(MEMORY):
            return found
        return (self.concepts[first.removeprefix(MEMORY)], *found[1:])


def refuse_unknown(mark: str, name: str, known: Iterable[str]) -> str:
    """Refuse a mark that looks like a concept's and is none; return it if it is plain text.

    Raises:
        UserError: it reads as plain text nobody has meant.
    """
    if not NAME.fullmatch(name):
        return mark
    require_no_loader(mark, name)
    raise UserError(
        f"The prompt has {mark}, but this CLIP knows no concept {name}. It knows: "
        f"{', '.join(known) or 'none'}. Correct the name, or connect the CLIP of an Apply Concept Tokens whose "
        "concepts have it; leave out < and > where you mean plain text."
    )


def known_names(tokenizer: Any, names: Iterable[str]) -> list[str]:
    """Return those of the concepts' names that a CLIP knows already."""
    parts = [part for part in vars(tokenizer).values() if isinstance(part, ConceptTokens)]
    return [name for name in names if any(name in part.concepts for part in parts)]


def require_new_names(tokenizer: Any, names: Iterable[str]) -> None:
    """Refuse concepts whose names a CLIP knows already.

    Raises:
        UserError: there is such a name.
    """
    if twice := known_names(tokenizer, names):
        raise UserError(
            f"Two Apply Concept Tokens give this CLIP a concept {', '.join(twice)}, and only one of them could "
            "be meant in a prompt. Learn one of them under another name, or take one of the nodes out."
        )


def with_concepts(tokenizer: Any, vectors: ConceptVectors, encoders: tuple[str, ...]) -> Any:
    """Return a copy of a CLIP's tokenizer that knows the concepts besides those it knew before."""
    aware = copy.copy(tokenizer)
    for encoder in encoders:
        inner = copy.copy(getattr(tokenizer, encoder))
        known = getattr(inner, "concepts", {})
        if not isinstance(inner, ConceptTokens):
            inner.__class__ = type("ConceptTokenizer", (ConceptTokens, type(inner)), {})
        added = {name: by_encoder[encoder] for name, by_encoder in vectors.items()}
        inner.concepts = {**known, **added}
        inner.embedding_directory = inner.embedding_directory or []
        setattr(aware, encoder, inner)
    return aware


def tokenize(tokenizer: Any, text: str) -> Tokens:
    """Return the tokens of each encoder, in chunks of the encoder's length."""
    return tokenizer.tokenize_with_weights(text, False)


def pad_chunks(tokens: Tokens, tokenizer: Any, chunks: int) -> Tokens:
    """Append empty chunks to the tokens, so that all prompts of a batch have the same length."""
    padded = {}
    for key, rows in tokens.items():
        inner = getattr(tokenizer, f"clip_{key}")
        fill = len(rows[0]) - 2
        empty = [inner.start_token, inner.end_token, *[inner.pad_token] * fill]
        padded[key] = rows + [[(token, 1.0) for token in empty]] * (chunks - len(rows))
    return padded


def find_columns(
    tokens: Tokens, tokenizer: Any, vectors: ConceptVectors
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Find where the concepts stand in a tokenised prompt.

    Returns:
        The positions of each concept's vectors in the encoded sequence, by name, and the position of
        the first end token.
    """
    key = next(iter(tokens))
    encoder = f"clip_{key}"
    owner = {
        row.data_ptr(): name
        for name, by_encoder in vectors.items()
        for row in by_encoder[encoder].detach()
    }
    # Word ids may stand in third place.
    flat = [entry[0] for chunk in tokens[key] for entry in chunk]
    columns: dict[str, tuple[int, ...]] = {}
    for position, token in enumerate(flat):
        if torch.is_tensor(token) and token.data_ptr() in owner:
            name = owner[token.data_ptr()]
            columns[name] = (*columns.get(name, ()), position)
    end_token = getattr(tokenizer, encoder).end_token
    end = next(
        position
        for position, token in enumerate(flat)
        if not torch.is_tensor(token) and token == end_token
    )
    return columns, end


def pieces(tokenizer: Any, encoder: str, words: str) -> list[int]:
    """Return the ids of the pieces of an encoder's vocabulary that plain words consist of."""
    inner = getattr(tokenizer, encoder)
    # The outer tokenizer also refuses words that the model does not know.
    rows = tokenize(tokenizer, words)[encoder.removeprefix("clip_")]
    special = {inner.start_token, inner.end_token, inner.pad_token}
    flat = [token for row in rows for token, _ in row]
    return [token for token in flat if not torch.is_tensor(token) and token not in special]


def word_vectors(clip: Any, encoder: str, words: str, count: int) -> Tensor | None:
    """Return `count` vectors of the words' pieces in float32 on the CPU; None if there are no words."""
    ids = pieces(clip.tokenizer, encoder, words)
    if not ids:
        return None
    return spread_pieces(token_table(clip, encoder)[ids], count)


def vocabularies(clip: Any, encoders: Iterable[str]) -> dict[str, Vocabulary]:
    """Return the text encoders' vocabularies, with the token tables as the checkpoint has them."""
    return {
        name: Vocabulary(partial(pieces, clip.tokenizer, name), unpatched_table(clip, name))
        for name in encoders
    }


def unpatched_table(clip: Any, encoder: str) -> Tensor:
    """Return a token table [v, d] without what LoRAs have put in it while the CLIP is loaded."""
    part = getattr(clip.cond_stage_model, encoder)
    weight = part.transformer.get_input_embeddings().weight
    named = {id(w): name for name, w in clip.cond_stage_model.named_parameters()}
    original = clip.patcher.backup.get(named.get(id(weight)))
    return (weight if original is None else original.weight).detach().float().cpu()


def token_table(clip: Any, encoder: str) -> Tensor:
    """Return an encoder's token embedding [v, d] in float32 on the CPU."""
    part = getattr(clip.cond_stage_model, encoder)
    return part.transformer.get_input_embeddings().weight.detach().float().cpu()


def require_same_count(vectors: ConceptVectors) -> None:
    """Refuse concepts whose text encoders have different numbers of vectors.

    Raises:
        UserError: there is such a concept; its columns would not line up.
    """
    for name, by_encoder in vectors.items():
        counts = {encoder: len(v) for encoder, v in by_encoder.items()}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"Concept {name} is inconsistent. Expected equally many vectors for each text encoder, "
                f"got {counts}. Learn it again."
            )


@contextmanager
def keep_saved() -> Iterator[None]:
    """Make autograd save copies, because ComfyUI's text encoder adds to its activations in place."""

    def pack(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_leaf else tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def results_stay(device: torch.device) -> Iterator[None]:
    """Let what the text encoders give stay on their device while the context is open.

    ComfyUI moves it to the CPU for the nodes in between. Here it goes straight on to the UNet, and
    the way to the CPU and back would wait for the device in each step.
    """
    before = mm.intermediate_device
    mm.intermediate_device = lambda: device
    try:
        yield
    finally:
        mm.intermediate_device = before
