"""Restrict where each concept may act, with masks on the cross-attention of its columns.

The CLIP notes in every conditioning at which columns its concepts stand. The MODEL's patch reads the
note and shuts a concept's columns off for the pixels outside its mask. Attention patches that are
already there run first, and what they add is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.conds import CONDConstant
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...em_core.masks.resizing import resize
from ...em_core.model.layers import size_of_map
from ...em_core.prompts import ConceptVectors
from .attention import CROSS, attention_modules
from .text import find_columns

NOTE = "concept_columns"
OFF = -1e4
PARTS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


@dataclass(frozen=True)
class Columns:
    """The positions of the concepts' vectors, the same for every sample of a conditioning.

    Attributes:
        positions: pairs of a concept and the positions of its vectors.
    """

    positions: tuple[tuple[str, tuple[int, ...]], ...]


def noting_clip(clip: Any, vectors: ConceptVectors) -> Any:
    """Return a CLIP that notes in each conditioning where the concepts stand."""

    class NotingClip(type(clip)):  # type: ignore[misc]
        def clone(self, *args: Any, **kwargs: Any) -> Any:
            twin = super().clone(*args, **kwargs)
            twin.__class__ = type(self)
            return twin

        def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
            columns, _ = find_columns(tokens, self.tokenizer, vectors)
            note = CONDConstant(Columns(tuple(columns.items())))
            for _, plain in encoded if columns else ():
                plain["model_conds"] = {**plain.get("model_conds", {}), NOTE: note}
            return encoded

    noting = clip.clone()
    noting.__class__ = NotingClip
    return noting


def laid_out_model(model: Any, masks: Mapping[str, Float[Tensor, "H W"]]) -> Any:
    """Return a MODEL in which each concept acts only inside its mask."""
    twin = model.clone()
    twin.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, NOTE, pass_note_on)
    options = twin.model_options["transformer_options"]
    replaced = dict(options.get("patches_replace", {}).get("attn2", {}))
    for name in attention_modules(twin.model.diffusion_model, CROSS):
        part, _, rest = name.partition(".")
        number = 0 if part == "middle_block" else int(rest.partition(".")[0])
        replaced.setdefault((PARTS[part], number), None)
    wrapped = {block: attend_inside(masks, before) for block, before in replaced.items()}
    options["patches_replace"] = {**options.get("patches_replace", {}), "attn2": wrapped}
    return twin


def pass_note_on(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Hand the note from the conditioning to the attention patches."""
    note = kwargs.pop(NOTE, None)
    if note is None:
        return executor(*args, **kwargs)
    if "transformer_options" in kwargs:
        kwargs["transformer_options"] = kwargs["transformer_options"] | {NOTE: note}
        return executor(*args, **kwargs)
    return executor(*args[:-1], args[-1] | {NOTE: note}, **kwargs)


def attend_inside(
    masks: Mapping[str, Float[Tensor, "H W"]], before: Callable[..., Tensor] | None
) -> Callable[..., Tensor]:
    """Return an attention that shuts concepts off outside their masks, on top of the patch `before`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heads, precision = options["n_heads"], options.get("attn_precision")
        note = options.get(NOTE)

        def plain(mask: Tensor | None = None) -> Tensor:
            return optimized_attention(
                q, k, v, heads, mask=mask, attn_precision=precision, transformer_options=options
            )

        if note is None:
            return plain() if before is None else before(q, k, v, options)
        size = size_of_map(q.shape[1], tuple(options["original_shape"][-2:]))
        inside = plain(shut_off(note, masks, size, k.shape[1]).to(q))
        return inside if before is None else before(q, k, v, options) + inside - plain()

    return attend


def shut_off(
    note: Columns, masks: Mapping[str, Tensor], size: tuple[int, int], tokens: int
) -> Float[Tensor, "q t"]:
    """Return what is added to the logits: a large negative number outside a concept's mask."""
    bias = torch.zeros(size[0] * size[1], tokens)
    for name, positions in note.positions:
        if name in masks:
            small = resize(masks[name].float().cpu(), size, "mask")
            outside = rearrange(small, "h w -> (h w)") < 0.5
            bias[:, list(positions)] = outside[:, None] * OFF
    return bias
