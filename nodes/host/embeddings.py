"""Embedding files of ComfyUI: start vectors of concepts, and names in prompts that have to exist."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.prompts import embedding_name

NAMED = re.compile(r"(?<!\S)embedding:([^\s<\[]+)")


def embedding_tensor(tokenizer: Any, encoder: str, name: str) -> Tensor | None:
    """Return an embedding file's vectors [n, d] for one text encoder, or None if there is no such file."""
    inner = getattr(tokenizer, encoder)
    if inner.embedding_directory is None:
        return None
    found = inner._try_get_embedding(name)[0]
    return None if found is None else found.detach().float().cpu().reshape(-1, found.shape[-1])


def require_embedding(tokenizer: Any, widths: Mapping[str, int], name: str) -> dict[str, Tensor]:
    """Return an embedding file's vectors for each text encoder, in ordinary tensors.

    Raises:
        UserError: the file does not exist or cannot be read, or is of another family of models.
    """
    found = {}
    for encoder, width in widths.items():
        vectors = embedding_tensor(tokenizer, encoder, name)
        if vectors is None:
            raise UserError(
                f"There is no embedding {name!r} that can be read. Expected a file of this name in "
                "models/embeddings (.safetensors, .pt or .bin). Correct the name, or put the file there."
            )
        if vectors.shape[-1] != width:
            raise UserError(
                f"The embedding {name!r} is of a different family of models. Expected vectors of width {width} "
                f"for {encoder}, got {vectors.shape[-1]}. Use one that was made for this checkpoint's family."
            )
        found[encoder] = vectors.clone()
    return found


def start_of_embedding(
    tokenizer: Any, widths: Mapping[str, int], words: str
) -> dict[str, Tensor] | None:
    """Return the vectors that `embedding:file` in a concept's mark stands for; None for ordinary words.

    Raises:
        UserError: the file is missing, damaged or of another family.
    """
    name = embedding_name(words)
    if name is None:
        return None
    found = require_embedding(tokenizer, widths, name)
    counts = {encoder: len(vectors) for encoder, vectors in found.items()}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"The embedding {name!r} cannot be a start. Expected equally many vectors for each text encoder, "
            f"got {counts}. Use another one."
        )
    return found


def require_embeddings(tokenizer: Any, widths: Mapping[str, int], texts: Iterable[str]) -> None:
    """Refuse prompts that name embeddings which ComfyUI would leave out without a word on the node.

    Raises:
        UserError: an embedding is missing, damaged or of another family.
    """
    for name in {name.strip(",") for text in texts for name in NAMED.findall(text)}:
        require_embedding(tokenizer, widths, name)
