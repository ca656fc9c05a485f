"""LoRA files of other programs on a diffusers pipeline, as concepts."""

import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Notice, UserError
from ..exchange.importing import imported, layer_of, read_lora, trigger_words
from ..exchange.names import RESNET, TEXT, diffusers_path, kohya_name, table_name
from ..model.adapters import DIFF, DOWN, UP
from ..runs.concept_set import ConceptSet
from .diffusers import DiffusersHost

BLOCK = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_(?:(\d+)_)?(.+)")
DOTTED = re.compile(r"^(unet\..+?)\.(?:processor\.)?(to_[qkvo]\w*?)(?:\.0)?$")
PATH = re.compile(r"^(diffusion_model|text_encoders\.clip_[lgh])\.(.+)$")
PLAIN = re.compile(r"[._](lora_up|lora_down|lora_A|lora_B|up|down|alpha|diff_b|diff)(?:\.weight)?$")
ROLES = {"lora_up": UP, "lora_B": UP, "up": UP, "lora_down": DOWN, "lora_A": DOWN, "down": DOWN}
ROLES |= {"diff": f".weight{DIFF}", "diff_b": f".bias{DIFF}"}


def concept_of_lora(host: DiffusersHost, path: Path, name: str, words: str) -> ConceptSet:
    """Return a LoRA file as a concept: its weights, and its trigger words' vectors as tokens.

    kohya's names are read, those of diffusers and of ComfyUI's own training, with factors or with whole
    differences, and this package's own files with tokens in them, which tell their trigger words.

    Raises:
        UserError: there are no name or trigger words, or the file tells others; or it is damaged, of
            another kind or family, or incomplete.
    """
    words = trigger_words(path, name, words)
    tensors = read_lora(path, name, words)
    layers = lora_layers(host)
    parts = parts_of(path, tensors)
    blocks = host.unet.config.layers_per_block
    sdxl = len(host.encoders) > 1
    found = {layer: own_name(layer, blocks, sdxl) for layer in parts}
    strange = [layer for layer, own in found.items() if own not in layers and not is_table(layer)]
    if len(strange) == len(parts):
        raise UserError(
            f"{path} fits no layer of this model. Expected a LoRA of its family, got layers such as "
            f"{', '.join(strange[:3])}. Load the model that it was made for."
        )
    if strange:
        warnings.warn(
            f"{len(strange)} of {len(parts)} layers of {path.name} are not in this model and are left out, such as "
            f"{strange[0]}.",
            Notice,
            stacklevel=2,
        )
    weights: dict[str, Tensor] = {}
    for layer, own in found.items():
        if own in layers and not is_table(layer):
            weights |= learned_of(path, *layers[own], parts[layer])
    return imported(
        path, name.strip(), words, vectors_of(host, path, words, parts), weights, host.identity()
    )


def lora_layers(host: DiffusersHost) -> dict[str, tuple[str, Any]]:
    """Map kohya's names, and paths with dots, to each layer that has weights and its path."""
    sdxl = len(host.encoders) > 1
    found: dict[str, tuple[str, Any]] = {}
    for root, module in host.modules():
        for name, layer in module.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor):
                path = f"{root}.{name}"
                found[path] = found[kohya_name(path, sdxl, 2)] = (path, layer)
    return found


def parts_of(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a LoRA file's tensors by their layers.

    Raises:
        UserError: a layer has other parts than up, down, alpha and differences, or only one of up and down.
    """
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, x in tensors.items():
        role = PLAIN.search(key)
        if role is None:
            raise UserError(
                f"{path} is of a kind that cannot become a concept. Expected a plain LoRA (lora_up and lora_down, "
                f"or diff), got {key}."
            )
        parts[layer_of(key)][ROLES.get(role[1], "alpha")] = x
    for layer, of in parts.items():
        whole = not {UP, DOWN} & of.keys() and any(role.endswith(DIFF) for role in of)
        if not whole and not {UP, DOWN} <= of.keys():
            raise UserError(
                f"{path} is incomplete: {layer} has {', '.join(sorted(of))} alone. Expected lora_up and lora_down "
                "of each layer. Download or save it again."
            )
    return dict(parts)


def is_table(layer: str) -> bool:
    return layer.startswith("text_encoders.") and layer.endswith("token_embedding")


def own_name(layer: str, blocks: int, sdxl: bool = False) -> str:
    """Return a layer's name in diffusers' terms: kohya's with underscores, or a path with dots."""
    if found := PATH.match(layer):
        root, rest = found.groups()
        path = layer if root == "diffusion_model" else f"{root.partition('.')[2]}.{rest}"
        return kohya_name(path, sdxl and bool(TEXT.match(path)), blocks)
    if found := BLOCK.fullmatch(layer):
        part, number, place, rest = found.groups()
        short = {name.replace(".", "_"): other for name, other in RESNET.items()}
        rest = short.get(rest, rest)
        own = ".".join(piece for piece in ("diffusion_model", part, number, place, rest) if piece)
        return f"lora_unet_{diffusers_path(own, blocks).replace('.', '_')}"
    if found := DOTTED.match(layer):
        return f"{found[1]}.{found[2]}" + ".0" * (found[2] == "to_out")
    return layer


def learned_of(
    path: Path, name: str, layer: nn.Module, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a layer's LoRA as a concept file keeps it: factors of a matrix, else whole differences.

    Raises:
        UserError: it has another shape than the layer.
    """
    found = differences_of(path, name, layer, parts)
    if UP not in parts:
        return found
    factors = factors_of(path, name, layer, parts)
    for key in found.keys() & factors.keys():
        factors[key] += found[key]
    return found | factors


def differences_of(
    path: Path, name: str, layer: nn.Module, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the whole differences of a layer's weight and bias.

    Raises:
        UserError: one has another shape than the layer.
    """
    found = {}
    for kind in ("weight", "bias"):
        difference = parts.get(f".{kind}{DIFF}")
        own: Any = getattr(layer, kind, None)
        if difference is None:
            continue
        if own is None or own.numel() != difference.numel() or len(own) != len(difference):
            expected = "no bias" if own is None else list(own.shape)
            raise UserError(
                f"{path} is of a different family of models. Expected {expected} at {name}, got "
                f"{list(difference.shape)}. Load the model that it was made for."
            )
        found[f"{name}.{kind}{DIFF}"] = difference.float().reshape(own.shape)
    return found


def factors_of(
    path: Path, name: str, layer: nn.Module, parts: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the factors of a matrix, or the difference that those of a kernel make.

    Raises:
        UserError: they have another shape than the layer.
    """
    up, down = parts[UP].float(), parts[DOWN].float()
    scale = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
    weight: Any = layer.weight
    expected, found = weight.shape, (len(up), *down.shape[1:])
    if expected.numel() != up.shape[0] * down[0].numel() or expected[:2] != found[:2]:
        raise UserError(
            f"{path} is of a different family of models. Expected {list(expected)} at {name}, got {list(found)}. "
            "Load the model that it was made for."
        )
    up = up.flatten(1) * scale
    if isinstance(layer, nn.Linear):
        return {name + DOWN: down.flatten(1), name + UP: up}
    return {f"{name}.weight{DIFF}": (up @ down.flatten(1)).reshape(expected)}


def vectors_of(
    host: DiffusersHost, path: Path, words: str, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the vectors of the trigger words' pieces, with what a file puts into the token tables.

    Raises:
        UserError: the model does not know a word, or the file has another token table.
    """
    host.require_known(words)
    found = {}
    for encoder, vocabulary in host.vocabularies().items():
        ids = vocabulary.pieces(words)
        rows = vocabulary.table[ids].clone()
        if entry := parts.get(table_name(encoder)):
            learned_of(path, table_name(encoder), table_of(vocabulary.table), entry)
            if UP in entry:
                up, down = entry[UP].float(), entry[DOWN].float()
                rows += up[ids] @ down * float(entry.get("alpha", len(down))) / len(down)
            if (whole := entry.get(f".weight{DIFF}")) is not None:
                rows += whole[ids].float()
        found[encoder] = rows
    return found


def table_of(table: Tensor) -> nn.Linear:
    """Return a token table in the form of a layer, for its shape."""
    with torch.device("meta"):
        return nn.Linear(table.shape[1], table.shape[0], bias=False)
