"""LoRA files of learned concepts: one for ComfyUI with the tokens in it, one for all other programs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model.adapters import DIFF, DOWN, UP
from ..prompts import ConceptVectors
from ..runs.concept_set import ConceptSet
from .low_rank import LowRank, low_rank
from .names import blocks_per_level, difference_name, kohya_name, table_name
from .triggers import Triggers, Vocabularies


def lora_tensors(concepts: ConceptSet) -> dict[str, Tensor]:
    """Return the learned weights as ComfyUI's LoRA loaders take them; empty if there are none."""
    return loadable(concepts.weights, concepts.lora_scale, is_sdxl(concepts))


def is_sdxl(concepts: ConceptSet) -> bool:
    return "clip_g" in concepts.identity.encoders


def loadable(weights: Mapping[str, Tensor], lora_scale: float, sdxl: bool) -> dict[str, Tensor]:
    """Rename learned weights to the names that LoRA loaders know (kohya's).

    Args:
        weights: `<path>.lora_down`, `.lora_up` or `.diff` tensors of either host.
        lora_scale: alpha / rank.
        sdxl: whether the model is SDXL.
    """
    tensors: dict[str, Tensor] = {}
    blocks = blocks_per_level(list(weights))
    for name, weight in weights.items():
        weight = weight.detach().clone().contiguous()
        if name.endswith(DIFF):
            tensors[difference_name(name.removesuffix(DIFF))] = weight
            continue
        end = DOWN if name.endswith(DOWN) else UP
        path = kohya_name(name.removesuffix(end), sdxl, blocks)
        rank = weights[name.removesuffix(end) + DOWN].shape[0]
        if end == UP:
            kernel = weights[name.removesuffix(end) + DOWN].ndim - 2
            weight = weight.reshape(*weight.shape, *[1] * kernel)
        tensors[f"{path}{end}.weight"] = weight
        tensors[f"{path}.alpha"] = torch.tensor(lora_scale * rank)
    return tensors


def with_tokens(
    concepts: ConceptSet, triggers: Triggers, vocabularies: Vocabularies
) -> dict[str, Tensor]:
    """Return all that was learned as ComfyUI's *Load LoRA* takes it: weights, and tokens at their triggers."""
    return lora_tensors(concepts) | token_entries(concepts.vectors, triggers, vocabularies)


def token_entries(
    vectors: ConceptVectors, triggers: Triggers, vocabularies: Vocabularies
) -> dict[str, Tensor]:
    """Return low-rank entries of the token tables that put learned vectors in the triggers' rows.

    To replace row i of a table E by v is to add e_i (v - E_i), a matrix of rank 1; one entry a table
    adds them all: `lora_up` [v, n] has a single 1 in each column, and `lora_down` [n, d] the changes.
    """
    entries: dict[str, Tensor] = {}
    for encoder, vocabulary in vocabularies.items():
        ids = [vocabulary.pieces(word)[0] for name in vectors for word in triggers[name]]
        learned = torch.cat([vectors[name][encoder].detach().float().cpu() for name in vectors])
        # 0 and 1 are exact in half precision, and the largest part of the file.
        up = torch.zeros(len(vocabulary.table), len(ids), dtype=torch.float16)
        up[ids, range(len(ids))] = 1
        name = table_name(encoder)
        entries[f"{name}{UP}.weight"] = up
        entries[f"{name}{DOWN}.weight"] = learned - vocabulary.table[ids].float().cpu()
        entries[f"{name}.alpha"] = torch.tensor(float(len(ids)))
    return entries


def for_others(concepts: ConceptSet, rank: int) -> tuple[dict[str, Tensor], LowRank]:
    """Return the learned weights as low-rank factors in kohya's names, which every program reads.

    A LoRA stays as it is; differences of whole weights become factors of rank `rank`.
    """
    differences = {n: x for n, x in concepts.weights.items() if n.endswith(DIFF)}
    lora = {n: x for n, x in concepts.weights.items() if not n.endswith(DIFF)}
    found, sdxl = low_rank(differences, rank), is_sdxl(concepts)
    renamed = loadable(lora, concepts.lora_scale, sdxl) | loadable(found.weights, 1.0, sdxl)
    return renamed, found
