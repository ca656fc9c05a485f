"""A digest of a graph's models and of all that acts on them; it identifies the model in a run's key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy
import comfy.model_management as mm
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor

from ...em_core.examples import Example
from ...em_core.prompts import ConceptPrompt
from ...em_core.runs.digest import INSTALLED, Digest, Parts, Reader
from .families import GraphModels
from .text import tokenize

ACTING = ("object_patches", "weight_wrapper_patches", "wrappers", "callbacks", "injections", "attachments",
          "additional_models")  # fmt: skip
# How the model is run: on which cards, and compiled or not.
NOT_ACTING = frozenset({"multigpu_clones", "torch.compile", "torch_compile_kwargs"})
# ComfyUI's notes on a model's layers: how they are loaded just now, not what they compute.
BOOKKEEPING = frozenset({
    "comfy_cast_weights", "prev_comfy_cast_weights", "comfy_force_cast_weights", "comfy_patched_weights",
    "weight_function", "bias_function", "weight_comfy_model_dtype", "bias_comfy_model_dtype",
    "weight_lowvram_function", "bias_lowvram_function", "seed_key", "currently_used", "device",
    "_v", "_v_signature", "_v_tensor", "_v_weight", "_v_bias", "_pin", "_pin_state", "_prefetch",
})  # fmt: skip
COMFYUI = Path(comfy.__path__[0]).parent
LIBRARIES = frozenset({*INSTALLED, str(COMFYUI / "comfy"), str(COMFYUI / "comfy_api")})


class InterruptibleDigest(Digest):
    """A digest that ComfyUI's Cancel stops: reading a large checkpoint's weights takes seconds."""

    def tensor(self, tensor: Tensor) -> None:
        """Add a tensor, or raise ComfyUI's interrupt if the user asked to stop."""
        mm.throw_exception_if_processing_interrupted()
        super().tensor(tensor)


def models_digest(models: GraphModels, examples: Sequence[Example]) -> str:
    """Return a digest of MODEL, CLIP and VAE with all that acts on them; it is the same after a restart.

    The examples' prompts take part as the CLIP's tokenizer reads them: with the content of the
    embeddings that they name, and without the white space that means nothing.

    Raises:
        Unreadable: the content of a patch cannot be read.
        UserError: the model does not know a word of a prompt.
    """
    model = models.model.model
    digest = InterruptibleDigest(READERS, LIBRARIES, BOOKKEEPING)
    digest.add([models.family, models.model, models.clip, models.vae])
    # What the model predicts and its schedule, patched or its own.
    digest.add(models.model.get_model_object("model_sampling"))
    digest.add([model.latent_format, model.model_config.unet_config, models.image_side])
    for example in examples:
        words = [concept.words for concept in example.prompt.concepts]
        texts = [text_of(example.prompt), *words]
        digest.add([tokenize(models.clip.tokenizer, text) for text in texts])
    return digest.hexdigest()


def text_of(prompt: ConceptPrompt) -> str:
    """Return the prompt with each concept replaced by its initial words, set apart by spaces."""
    parts = (part if isinstance(part, str) else f" {part.words} " for part in prompt.parts)
    return " ".join("".join(parts).split())


def patcher_parts(digest: Digest, patcher: Any) -> Parts:
    """A model's weights before any patch, and every patch; not how and where it is loaded."""
    kind = type(patcher)
    options = without(patcher.model_options, NOT_ACTING)
    held = {name: getattr(patcher, name, {}) for name in ACTING}
    wrappers = {at: without(by_key, NOT_ACTING) for at, by_key in held["wrappers"].items()}
    held["wrappers"] = {at: by_key for at, by_key in wrappers.items() if by_key}
    patches = sorted(patcher.patches.items(), key=lambda item: str(item[0]))
    return [
        None if kind.__module__.startswith("comfy.") else kind,
        type(patcher.model),
        weights_of(patcher.model, patcher.backup),
        *(part for key, given in patches for part in (key, list(given))),
        options,
        held,
    ]


def without(named: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in names}


def weights_of(model: Any, backup: Any) -> dict[str, Any]:
    """Return a model's weights and buffers by name, as they are without patches."""
    named = dict(model.named_parameters())
    # The schedule's buffers stand in the model only while it is loaded, if they are patched.
    named |= {n: x for n, x in model.named_buffers() if not n.startswith("model_sampling.")}
    return {
        name: backup[name].weight if backup.get(name) is not None else named[name]
        for name in sorted(named)
    }


def base_parts(digest: Digest, model: Any) -> Parts:
    """A model that a patch holds on to, without its patches."""
    backup = getattr(getattr(model, "current_patcher", None), "backup", {})
    return [type(model), weights_of(model, backup)]


def clip_parts(digest: Digest, clip: Any) -> Parts:
    return [clip.patcher, clip.layer_idx]


def vae_parts(digest: Digest, vae: Any) -> Parts:
    """Its weights, and how pictures go in."""
    acting = ("process_input", "downscale_ratio", "latent_channels", "crop_input", "vae_dtype")
    return [vae.patcher, *(getattr(vae, name, None) for name in acting)]


READERS: tuple[Reader, ...] = (
    (ModelPatcher, patcher_parts),
    (BaseModel, base_parts),
    (CLIP, clip_parts),
    (VAE, vae_parts),
)
