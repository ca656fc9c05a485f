"""Private copies of a MODEL's and CLIP's weights, so that learning never touches the user's own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from torch import nn

from .families import require_plain_weights


def without_paging(patcher: Any) -> Any:
    """A clone whose weights lie in memory as a whole (newer ComfyUI pages them in by layer)."""
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():
        return patcher.clone(disable_dynamic=True)
    return patcher.clone()


def copy_module(model: nn.Module) -> nn.Module:
    """A deep copy of a model's weights; its configuration and patcher are not copied."""
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


def private_patcher(patcher: Any, dtype: torch.dtype | None, what: str) -> Any:
    """A patcher with all of `patcher`'s patches over its own copy of the weights.

    `patcher` must be unloaded: what is copied are the weights without any patch on them.

    Raises:
        UserError: the weights are of a kind that has no gradient.
    """
    own = without_paging(patcher)
    require_plain_weights(own.model, what)
    own.model = copy_module(own.model).requires_grad_(False)
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
    """A CLIP with all patches of `clip` over its own copy of the weights."""
    own = clip.clone()
    own.patcher = private_patcher(clip.patcher, None, "CLIP")
    own.cond_stage_model = own.patcher.model
    if dtype is not None:
        own.cond_stage_model.to(dtype)
    return own


def unload(patcher: Any) -> None:
    """Take a patcher off the device and out of ComfyUI's list of loaded models."""
    for i in reversed(range(len(mm.current_loaded_models))):
        if mm.current_loaded_models[i].model is patcher:
            mm.current_loaded_models.pop(i).model_unload()


@contextmanager
def learning_mode() -> Iterator[None]:
    """Gradients in spite of the executor's inference mode; ComfyUI's fused kernels off."""
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
    """Copies of MODEL and CLIP to learn on; gone from the device afterwards, also after an exception."""
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
