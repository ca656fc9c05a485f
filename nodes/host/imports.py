"""LoRAs of other programs as concepts: read by ComfyUI's own loader, whatever their format."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ...em_core.errors import Notice, UserError
from ...em_core.exchange.importing import (
    imported,
    layer_of,
    read_lora,
    trigger_words,
    unknown_model,
)
from ...em_core.model.adapters import DIFF, DOWN, UP
from ...em_core.runs.concept_set import ConceptSet
from .families import encoder_widths, family_of, require_unet
from .text import pieces, unpatched_table

TABLE = ".token_embedding"
# diffusers' own names of attention layers, of which ComfyUI knows the former form alone.
ATTENTION = re.compile(r"^(unet\..+?)\.(?:processor\.)?(to_[qkvo]\w*?)(?:\.0)?(?=[._]lora)")
WEIGHT = ".weight"


def concept_of_lora(path: Path, name: str, words: str, model: Any, clip: Any) -> ConceptSet:
    """Return a LoRA file as a concept: its weights, and its trigger words' vectors as tokens.

    A file with tokens in it, as this pack writes it, gives the tokens at its trigger words.

    Raises:
        UserError: there are no name, trigger words, MODEL or CLIP; or the file is damaged, of another
            kind or family, or incomplete.
    """
    words = trigger_words(path, name, words)
    tensors = read_lora(path, name, words)
    if model is None or clip is None:
        raise UserError(
            f"{path.name} is a LoRA. Connect the MODEL and CLIP of the checkpoint that it was made for: they tell "
            "where its layers are."
        )
    require_unet(model)
    widths = encoder_widths(clip)
    matched = match(path, tensors, model, clip)
    weights: dict[str, Tensor] = {}
    for key, patch in matched.items():
        weights |= learned_of(path, key, patch)
    require_shapes(path, weights, model, clip)
    vectors = {encoder: rows(clip, encoder, words, weights) for encoder in widths}
    kept = {key: x for key, x in weights.items() if TABLE not in key}
    identity = unknown_model(family_of(model, widths)[0], widths)
    return imported(path, name.strip(), words, vectors, kept, identity)


def match(path: Path, tensors: Mapping[str, Tensor], model: Any, clip: Any) -> dict[str, Any]:
    """Return what ComfyUI's loader makes of a LoRA: weight -> patch; says which layers fit nothing.

    Raises:
        UserError: no layer fits, or one lacks a part.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
    known = {ATTENTION.sub(r"\1.processor.\2", name): x for name, x in tensors.items()}
    converted = comfy.lora_convert.convert_lora(known)
    try:
        matched = comfy.lora.load_lora(converted, keys, log_missing=False)
    except KeyError as error:
        raise UserError(
            f"{path} is incomplete: it has no {error.args[0]}. Expected lora_up and lora_down of each layer. "
            "Download or save it again."
        ) from error
    layers = {layer_of(key) for key in converted}
    strange = sorted(layers - set(keys))
    if not matched:
        raise UserError(
            f"{path} fits no layer of this checkpoint. Expected a LoRA of its family, got layers such as "
            f"{', '.join(strange[:3]) or 'none'}. Connect the MODEL and CLIP that it was made for."
        )
    if strange:
        warnings.warn(
            f"{len(strange)} of {len(layers)} layers of {path.name} are not in this checkpoint and are left out, "
            f"such as {strange[0]}.",
            Notice,
            stacklevel=3,
        )
    return matched


def learned_of(path: Path, key: str, patch: Any) -> dict[str, Tensor]:
    """Return a patch as a concept file keeps it: factors with their alpha, or a difference.

    Raises:
        UserError: it is of another kind, such as LoHa, LoKr or DoRA.
    """
    layer = key.removesuffix(WEIGHT)
    if isinstance(patch, tuple) and patch[0] == "diff":
        return {f"{key}{DIFF}": patch[1][0].float()}
    if not isinstance(patch, LoRAAdapter) or any(part is not None for part in patch.weights[3:]):
        kind = getattr(patch, "name", patch[0] if isinstance(patch, tuple) else "another")
        kind = "one with a middle factor, DoRA or another shape" if kind == "lora" else kind
        raise UserError(
            f"{path} is of a kind that cannot become a concept. Expected a plain LoRA (lora_up and lora_down), got "
            f"{kind} at {layer}. Load it with ComfyUI's Load LoRA instead."
        )
    up, down, alpha = patch.weights[:3]
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return {layer + DOWN: down.float(), layer + UP: up.float().flatten(1) * scale}


def require_shapes(path: Path, weights: Mapping[str, Tensor], model: Any, clip: Any) -> None:
    """Refuse a LoRA whose layers have the names but not the shapes of this checkpoint's.

    Raises:
        UserError: there is such a layer.
    """
    own = {f"diffusion_model.{n}": w for n, w in model.model.diffusion_model.named_parameters()}
    own |= dict(clip.cond_stage_model.named_parameters())
    for key, x in weights.items():
        if key.endswith(UP):
            continue
        of_factors = key.endswith(DOWN)
        name = f"{key.removesuffix(DOWN)}{WEIGHT}" if of_factors else key.removesuffix(DIFF)
        expected = list(own[name].shape)
        up = weights[key.removesuffix(DOWN) + UP] if of_factors else x
        found = [len(up), *x.shape[1:]]
        if expected != found and not (of_factors and flat(expected) == flat(found)):
            raise UserError(
                f"{path} is of a different family of models. Expected {expected} at {name}, got {found}. "
                "Connect the MODEL and CLIP that it was made for."
            )


def flat(shape: Sequence[int]) -> list[int]:
    """Return a shape without the 1s of a kernel that is as good as a matrix."""
    return [*shape[:2], *(side for side in shape[2:] if side != 1)]


def rows(clip: Any, encoder: str, words: str, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the vectors of the trigger words' pieces, with what a file puts into the token table.

    Raises:
        UserError: the words have no pieces.
    """
    ids = pieces(clip.tokenizer, encoder, words)
    if not ids:
        raise UserError(
            f"The trigger words {words!r} have no pieces. Expected words, as in 'sks dog'."
        )
    found = unpatched_table(clip, encoder)[ids].clone()
    for key, up in weights.items():
        if key.startswith(f"{encoder}.") and key.endswith(TABLE + UP):
            found += up[ids] @ weights[key.removesuffix(UP) + DOWN]
    return found
