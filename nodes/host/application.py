"""Apply concepts to clones of a MODEL and a CLIP; the originals are not touched."""

from collections.abc import Mapping
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.exchange.lora import lora_tensors
from ...em_core.runs.concept_set import ConceptSet
from .embeddings import start_of_embedding
from .families import encoder_widths, require_there, text_encoders
from .layout import laid_out
from .text import require_new_names, require_same_count, with_concepts, word_vectors


def require_same_family(concepts: ConceptSet, clip: Any) -> None:
    """Refuse concepts that were learned on a different family.

    Raises:
        UserError: the concepts' vectors do not fit the CLIP's text encoders.
    """
    ours = encoder_widths(clip)
    theirs = dict(concepts.identity.encoders)
    if ours != theirs:
        raise UserError(
            f"The concepts {', '.join(concepts.names)} do not fit this CLIP. Expected the text encoders of the "
            f"family they were learned on, {concepts.identity.family} ({theirs}), got {ours}. Use a checkpoint "
            "of that family."
        )


def apply_concepts(
    model: Any,
    clip: Any,
    concepts: ConceptSet,
    strength: float,
    masks: Mapping[str, Tensor] | None = None,
) -> tuple[Any, Any]:
    """Return clones of MODEL and CLIP that know the concepts.

    `strength` scales the learned weights and moves the tokens from the words that they started
    from (0) to what was learned (1), or beyond. `masks` say where each concept may act.

    Raises:
        UserError: the concepts were learned on a different family.
    """
    require_there(model=model, clip=clip)
    require_same_family(concepts, clip)
    require_same_count(concepts.vectors)
    vectors = {name: vectors_at(clip, concepts, name, strength) for name in concepts.names}
    lora = lora_tensors(concepts)
    if lora and strength:
        new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, lora, strength, strength)
    else:
        new_model, new_clip = model.clone(), clip.clone()
    require_new_names(clip.tokenizer, concepts.names)
    new_clip.tokenizer = with_concepts(clip.tokenizer, vectors, tuple(text_encoders(clip)))
    if not masks:
        return new_model, new_clip
    return laid_out(new_model, new_clip, vectors, masks)


def vectors_at(clip: Any, concepts: ConceptSet, name: str, strength: float) -> Mapping[str, Tensor]:
    """Return a concept's vectors at a strength; without initial words they are scaled from zero.

    Raises:
        UserError: the embedding that it started from is needed, and is gone or another one.
    """
    learned = {encoder: v.detach().clone().float() for encoder, v in concepts.vectors[name].items()}
    if strength == 1:
        return learned
    words = next(concept.words for concept in concepts.concepts if concept.name == name)
    file = start_of_embedding(clip.tokenizer, encoder_widths(clip), words)
    scaled = {}
    for encoder, v in learned.items():
        start = word_vectors(clip, encoder, words, len(v)) if file is None else file[encoder]
        if start is not None and len(start) != len(v):
            raise UserError(
                f"The strength of {name} cannot be changed. Expected {len(v)} vectors in {words!r}, which it "
                f"started from, got {len(start)}. Put that file back, or set the strength to 1."
            )
        start = torch.zeros_like(v) if start is None else start
        scaled[encoder] = start + strength * (v - start)
    return scaled
