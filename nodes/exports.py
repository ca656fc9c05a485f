"""Learned concepts in the formats that ComfyUI and other programs read: embeddings and LoRAs."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..em_core.model.adapters import DIFF, DOWN, UP
from ..em_core.runs.concept_set import ConceptSet

TEXT = re.compile(r"^(?:text_encoder(?:_2)?|clip_[lgh]\.transformer)\.(?:text_model\.)?(?=.)")
SECOND = ("clip_g.", "text_encoder_2.")
BLOCKS = re.compile(
    r"^diffusion_model\.(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.*)$"
)


def embedding_tensors(concepts: ConceptSet, name: str) -> dict[str, Tensor]:
    """Return an embedding file's tensors: `emb_params`, or `clip_l` and `clip_g` for SDXL's two encoders."""
    vectors = {
        encoder: v.detach().float().contiguous() for encoder, v in concepts.vectors[name].items()
    }
    return {"emb_params": next(iter(vectors.values()))} if len(vectors) == 1 else vectors


def lora_tensors(concepts: ConceptSet) -> dict[str, Tensor]:
    """Return the learned weights as LoRA loaders expect them; empty if there are none."""
    return loadable(concepts.weights, concepts.lora_scale, "clip_g" in concepts.identity.encoders)


def loadable(weights: Mapping[str, Tensor], lora_scale: float, sdxl: bool) -> dict[str, Tensor]:
    """Rename learned weights to the names that LoRA loaders know (kohya's)."""
    tensors: dict[str, Tensor] = {}
    blocks = 2 if any(".input_blocks.2." in name for name in weights) else 1
    for name, weight in weights.items():
        weight = weight.detach().clone().contiguous()
        if name.endswith(DIFF):
            tensors[difference_name(name.removesuffix(DIFF))] = weight
            continue
        end = DOWN if name.endswith(DOWN) else UP
        path = kohya_name(name.removesuffix(end), sdxl, blocks)
        rank = weights[name.removesuffix(end) + DOWN].shape[0]
        tensors[f"{path}{end}.weight"] = weight
        tensors[f"{path}.alpha"] = torch.tensor(lora_scale * rank)
    return tensors


def kohya_name(path: str, sdxl: bool, blocks: int) -> str:
    """Return the name `lora_unet_...` or `lora_te_...` of a layer of either host."""
    if TEXT.match(path):
        prefix = "lora_te" if not sdxl else "lora_te2" if path.startswith(SECOND) else "lora_te1"
        return f"{prefix}_text_model_{TEXT.sub('', path).replace('.', '_')}"
    if path.startswith("unet."):
        return f"lora_unet_{path.removeprefix('unet.').replace('.', '_')}"
    # kohya keeps the checkpoint's names for SDXL's UNet and uses diffusers' names for the others.
    name = path.removeprefix("diffusion_model.") if sdxl else diffusers_path(path, blocks)
    return f"lora_unet_{name.replace('.', '_')}"


def diffusers_path(path: str, blocks: int) -> str:
    """Return diffusers' name of an attention layer.

    Args:
        path: ComfyUI's name of it.
        blocks: residual blocks per level on the way down.
    """
    found = BLOCKS.match(path)
    if found is None:
        return path.removeprefix("diffusion_model.")
    part, number, _, rest = found.groups()
    if part == "middle_block":
        return f"mid_block.attentions.0.{rest}"
    index = int(number)
    if part == "input_blocks":
        level, position = divmod(index - 1, blocks + 1)
        return f"down_blocks.{level}.attentions.{position}.{rest}"
    level, position = divmod(index, blocks + 1)
    return f"up_blocks.{level}.attentions.{position}.{rest}"


def difference_name(path: str) -> str:
    """Return the name `<layer>.diff` or `<layer>.diff_b`, as ComfyUI's own training writes it."""
    layer, _, kind = path.rpartition(".")
    end = ".diff_b" if kind == "bias" else ".diff"
    if layer.startswith("unet."):
        return f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}{end}"
    if layer.startswith("text_encoder"):
        encoder = "clip_g" if layer.startswith(SECOND) else "clip_l"
        return f"text_encoders.{encoder}.transformer.text_model.{TEXT.sub('', layer)}{end}"
    return (
        f"{layer}{end}" if layer.startswith("diffusion_model.") else f"text_encoders.{layer}{end}"
    )


def lora_metadata(concepts: ConceptSet) -> Mapping[str, str]:
    """Return the metadata that other programs show for a LoRA."""
    base = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
    family = concepts.identity.family
    return {
        "ss_base_model_version": base.get(family, family),
        "modelspec.title": ", ".join(concepts.names),
        "ss_tag_frequency": "{}",
    }
