"""Prompts of any length as the text encoders of a CLIP read them, with concepts' vectors in their places."""

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.model.protocol import Conditioning, TextStream
from ...em_core.prompts import ConceptPrompt, ConceptVectors
from .embeddings import require_embeddings
from .text import (
    Tokens,
    find_columns,
    keep_saved,
    pad_chunks,
    require_same_count,
    results_stay,
    tokenize,
    with_concepts,
)

PARENTHESIS = re.compile(r"(?<!\\)([()])")  # of a description, where it is no weight


def encode_prompts(
    clip: Any,
    encoders: Mapping[str, int],
    device: torch.device,
    prompts: Sequence[ConceptPrompt],
    vectors: ConceptVectors,
) -> Conditioning:
    """Encode prompts of any length, with the vectors in place of the concepts.

    Args:
        clip: a CLIP on its device.
        encoders: its text encoders' names and widths, in the order in which their outputs are joined.
        device: where the results go.
        prompts, vectors: the prompts, and the concepts' vectors for each encoder.

    Raises:
        UserError: a concept has no vectors.
    """
    require_same_count(vectors)
    tokenizer = with_concepts(clip.tokenizer, vectors, tuple(encoders))
    texts = [prompt_text(prompt, vectors) for prompt in prompts]
    require_embeddings(clip.tokenizer, encoders, set(texts))
    tokens = {text: tokenize(tokenizer, text) for text in dict.fromkeys(texts)}
    chunks = max(len(rows) for by_encoder in tokens.values() for rows in by_encoder.values())
    places = [find_columns(of, tokenizer, vectors) for of in tokens.values()]
    padded = [pad_chunks(of, tokenizer, chunks) for of in tokens.values()]
    y, pooled = encode_texts(clip, list(encoders)[-1], device, padded, chunks)
    columns, end = zip(*places, strict=True)
    inputs = {"y": y} | ({} if pooled is None else {"pooled": pooled})
    distinct = Conditioning(inputs, {"text": TextStream(y.shape[1], columns, end)})
    order = [list(tokens).index(text) for text in texts]
    return distinct if order == list(range(len(y))) else distinct.rows(order)


def encode_texts(
    clip: Any, last: str, device: torch.device, texts: Sequence[Tokens], chunks: int
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"] | None]:
    """Return the sequences and pooled vectors of texts of equally many chunks, encoded in one call.

    ComfyUI reads the texts as one long text, of which it pools the first chunk alone; the other
    texts' pooled vectors are taken from the encoder that pooled it, which is the `last`.
    """
    rows: list[Tensor] = []
    encoder = getattr(clip.cond_stage_model, last)
    handle = encoder.register_forward_hook(lambda module, args, out: rows.append(out[1]))
    try:
        together = {key: [row for text in texts for row in text[key]] for key in texts[0]}
        y, pooled = encode_tokens(clip, device, together)
    finally:
        handle.remove()
    y = rearrange(y, "1 (b t) d -> b t d", b=len(texts))
    if pooled is None or len(texts) == 1:
        return y, pooled
    if rows and len(rows[-1]) >= len(texts) * chunks:
        return y, rows[-1][: len(texts) * chunks : chunks].to(pooled)
    one_by_one = [encode_tokens(clip, device, text)[1] for text in texts]
    return y, torch.cat([vector for vector in one_by_one if vector is not None])


def encode_tokens(clip: Any, device: torch.device, tokens: Any) -> tuple[Tensor, Tensor | None]:
    """Return the encoded sequence [1, t, d] and the first chunk's pooled vector [1, d], as
    CLIP.encode_from_tokens does."""
    encoder = clip.cond_stage_model
    encoder.reset_clip_options()
    if clip.layer_idx is not None:
        encoder.set_clip_options({"layer": clip.layer_idx})
    encoder.set_clip_options({"execution_device": clip.patcher.load_device})
    keeping = keep_saved() if torch.is_grad_enabled() else nullcontext()
    with keeping, results_stay(device):
        y, pooled = encoder.encode_token_weights(tokens)[:2]
    y = y.to(device).float()
    return y, None if pooled is None else pooled.to(device).float()


def prompt_text(prompt: ConceptPrompt, vectors: ConceptVectors) -> str:
    """Return the prompt with its concepts written as `<name>`.

    Raises:
        UserError: a concept has no vectors.
    """
    missing = [name for name in prompt.names if name not in vectors]
    if missing:
        raise UserError(
            f"Concept {', '.join(missing)} has not been learned. Known: {', '.join(vectors) or 'none'}."
        )
    return "".join(
        PARENTHESIS.sub(r"\\\1", part) if isinstance(part, str) else f"<{part.name}>"
        for part in prompt.parts
    )
