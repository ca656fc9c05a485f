"""Private copies of a MODEL's and CLIP's weights, so that learning never touches the user's own."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from torch import nn

from ...em_core.model.frozen import frozen_layers
from .families import require_plain_weights
from .patches import refusal, uncompiled

PAGING = re.compile(
    r"_v(_.*)?|_pins?(_.*)?|_prefetch(_.*)?|_comfy_graph|dynamic_(vbars|pins|patchers)|.*_lowvram_function"
)
"""Attributes that modules have only while their weights are paged."""


def without_paging(patcher: Any) -> Any:
    """Return a clone with all its weights in memory (newer ComfyUI pages them in layer by layer).

    Where the original is paged, the clone has a module of its own: loaded anew, or a copy where another
    pack's loader gave ComfyUI no way to do that.
    """
    if not (hasattr(patcher, "is_dynamic") and patcher.is_dynamic()):
        return patcher.clone()
    if getattr(patcher, "cached_patcher_init", None) is not None:
        return patcher.clone(disable_dynamic=True)
    module = copy_module(patcher.model, lambda name: None)
    for part in module.modules():
        for name in [name for name in vars(part) if PAGING.fullmatch(name)]:
            delattr(part, name)
        vars(part).pop("comfy_cast_weights", None)  # the class has what is right without paging
    backups: tuple[Any, ...] = ({}, {}, {}, set())
    return patcher.clone(disable_dynamic=True, model_override=(module, backups))


def own_module(patcher: Any, own: Any, casts: Callable[[str], torch.dtype | None]) -> nn.Module:
    """Return a module of `own` that nobody else has, with each weight in the type that `casts` gives.

    A clone that was loaded anew, because its original is paged, has one already.
    """
    if own.model is patcher.model:
        return copy_module(own.model, casts)
    for name, weight in own.model.named_parameters():
        weight.data = weight.data.to(casts(name) or weight.dtype)
    return own.model


def copy_module(model: nn.Module, casts: Callable[[str], torch.dtype | None]) -> nn.Module:
    """Deep-copy a model, each weight at once in its new type, but not its configuration or patcher."""
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(
            weight.detach().to(casts(name) or weight.dtype, copy=True), requires_grad=False
        )
        for name, weight in model.named_parameters()
    }
    for name in ("model_config", "current_patcher", "latent_format"):
        value = getattr(model, name, None)
        if value is not None:
            shared[id(value)] = value
    for module in model.modules():
        paging = (value for name, value in vars(module).items() if PAGING.fullmatch(name))
        shared |= {id(value): value for value in paging}
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


def private_patcher(
    patcher: Any, what: str, casts: Callable[[str], torch.dtype | None] = lambda name: None
) -> Any:
    """Return a patcher that has all of `patcher`'s patches and its own copy of the weights.

    `patcher` must be unloaded, so that the copied weights have no patch applied to them.

    Args:
        patcher: of the user's model.
        what: what it is called in messages.
        casts: gives the number type of each weight in the copy; None keeps its own.

    Raises:
        UserError: the weights are of a kind that has no gradient.
    """
    plain = uncompiled(patcher)
    require_plain_weights(plain.model, what)
    own = without_paging(plain)
    if own.injections and own.model is not patcher.model:
        raise refusal(
            patcher, "it is bound to the modules of another copy of the model", learning=True
        )
    with injected(own):
        module = own_module(patcher, own, casts)
    own.model, own.injections = module.requires_grad_(False), {}
    own.size = 0  # it is counted again when it is asked for
    own.backup, own.object_patches_backup, own.hook_backup = {}, {}, {}
    own.pinned, own.parent = set(), None
    if hasattr(own, "backup_buffers"):
        own.backup_buffers = {}
    return own


def private_model(model: Any, dtype: torch.dtype, storage: torch.dtype | None) -> Any:
    """Return a MODEL that has all of `model`'s patches and its own copy of the weights.

    The UNet computes in `dtype`. Its matrices are stored in `storage` where that is given, and cast
    layer by layer; the small rest, normalisation and biases, is always in `dtype`.
    """
    matrices = {
        f"diffusion_model.{name}"
        for name, weight in model.model.diffusion_model.named_parameters()
        if weight.ndim > 1
    }

    def casts(name: str) -> torch.dtype | None:
        if not name.startswith("diffusion_model."):
            return None
        return storage if storage is not None and name in matrices else dtype

    own = private_patcher(model, "MODEL", casts)
    unet = own.model.diffusion_model
    unet.dtype, own.model.manual_cast_dtype = dtype, None
    if storage is not None:
        for module in unet.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
    if hasattr(mm, "archive_model_dtypes"):
        mm.archive_model_dtypes(unet)
    return own


def private_clip(clip: Any, dtype: torch.dtype | None) -> Any:
    """Return a CLIP that has all of `clip`'s patches and its own copy of the weights."""
    own = clip.clone()
    own.patcher = private_patcher(clip.patcher, "CLIP", lambda name: dtype)
    own.cond_stage_model = own.patcher.model
    return own


def unload(patcher: Any) -> None:
    """Take a patcher off the device and out of ComfyUI's list of loaded models."""
    unload_where(lambda loaded: loaded is patcher)


def unload_where(chosen: Callable[[Any], bool]) -> None:
    """Do that with all patchers that are chosen."""
    for index in reversed(range(len(mm.current_loaded_models))):
        if chosen(mm.current_loaded_models[index].model):
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
    model: Any,
    clip: Any,
    dtype: torch.dtype,
    clip_dtype: torch.dtype | None,
    storage: torch.dtype | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Provide copies of MODEL and CLIP to learn on; they leave the device even after an exception.

    See :func:`private_model` for the types.
    """
    mm.unload_all_models()
    # On a machine with a card, those that are kept on the CPU stay loaded, with their patches in their weights.
    modules = [uncompiled(patcher).model for patcher in (model, clip.patcher)]
    unload_where(lambda loaded: any(getattr(loaded, "model", None) is each for each in modules))
    with learning_mode():
        own_model = private_model(model, dtype, storage)
        own_clip = private_clip(clip, clip_dtype)
        try:
            with frozen_layers(own_model.model.diffusion_model, own_clip.cond_stage_model):
                yield own_model, own_clip
        finally:
            own_model.cleanup()
            for patcher in (own_model, own_clip.patcher):
                unload(patcher)
            mm.soft_empty_cache()
