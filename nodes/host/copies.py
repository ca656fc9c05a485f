"""Private copies of a MODEL's and CLIP's weights, so that learning never touches the user's own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from torch import nn

from .families import require_plain_weights
from .patches import refusal, uncompiled


def without_paging(patcher: Any) -> Any:
    """Return a clone with all its weights in memory (newer ComfyUI pages them in layer by layer)."""
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        return patcher.clone(disable_dynamic=True)
    return patcher.clone()


def copy_module(model: nn.Module) -> nn.Module:
    """Deep-copy a model's weights, but not its configuration or patcher."""
    shared = {}
    for name in ("model_config", "current_patcher", "latent_format"):
        value = getattr(model, name, None)
        if value is not None:
            shared[id(value)] = value
    twin = copy.deepcopy(model, shared)
    for name in ("current_patcher", "current_weight_patches_uuid"):
        if hasattr(twin, name):
            setattr(twin, name, None)
    return twin


@contextmanager
def injected(patcher: Any) -> Iterator[None]:
    """Let what other nodes inject into the modules, such as a LoRA in bypass mode, stand in them.

    A copy that is made now has copies of it in its own modules, where injecting again would change
    the user's.
    """
    patcher.inject_model()
    try:
        yield
    finally:
        patcher.eject_model()


def private_patcher(patcher: Any, dtype: torch.dtype | None, what: str) -> Any:
    """Return a patcher that has all of `patcher`'s patches and its own copy of the weights.

    `patcher` must be unloaded, so that the copied weights have no patch applied to them.

    Raises:
        UserError: the weights are of a kind that has no gradient.
    """
    own = without_paging(uncompiled(patcher))
    require_plain_weights(own.model, what)
    if own.injections and own.model is not patcher.model:
        raise refusal(
            patcher, "it is bound to the modules of another copy of the model", learning=True
        )
    with injected(own):
        own_module = copy_module(own.model)
    own.model, own.injections = own_module.requires_grad_(False), {}
    own.backup, own.object_patches_backup, own.hook_backup = {}, {}, {}
    own.pinned, own.parent = set(), None
    if hasattr(own, "backup_buffers"):
        own.backup_buffers = {}
    if dtype is not None:
        unet = own.model.diffusion_model.to(dtype)
        unet.dtype, own.model.manual_cast_dtype = dtype, None
        if hasattr(mm, "archive_model_dtypes"):
            mm.archive_model_dtypes(unet)
    return own


def private_clip(clip: Any, dtype: torch.dtype | None) -> Any:
    """Return a CLIP that has all of `clip`'s patches and its own copy of the weights."""
    own = clip.clone()
    own.patcher = private_patcher(clip.patcher, None, "CLIP")
    own.cond_stage_model = own.patcher.model
    if dtype is not None:
        own.cond_stage_model.to(dtype)
    return own


def unload(patcher: Any) -> None:
    """Take a patcher off the device and out of ComfyUI's list of loaded models."""
    for index in reversed(range(len(mm.current_loaded_models))):
        if mm.current_loaded_models[index].model is patcher:
            mm.current_loaded_models.pop(index).model_unload()


@contextmanager
def learning_mode() -> Iterator[None]:
    """Enable gradients despite the executor's inference mode, and turn ComfyUI's fused kernels off."""
    before = getattr(mm, "in_training", None)
    with torch.inference_mode(False), torch.enable_grad():
        try:
            if before is not None:
                mm.in_training = True
            yield
        finally:
            if before is not None:
                mm.in_training = before


@contextmanager
def private_copies(
    model: Any, clip: Any, dtype: torch.dtype, clip_dtype: torch.dtype | None
) -> Iterator[tuple[Any, Any]]:
    """Provide copies of MODEL and CLIP to learn on; they leave the device even after an exception."""
    mm.unload_all_models()
    with learning_mode():
        own_model = private_patcher(model, dtype, "MODEL")
        own_clip = private_clip(clip, clip_dtype)
        try:
            yield own_model, own_clip
        finally:
            own_model.cleanup()
            for patcher in (own_model, own_clip.patcher):
                unload(patcher)
            mm.soft_empty_cache()
