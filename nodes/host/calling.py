"""Calling the UNet as ComfyUI's samplers do, through the wrappers and patches of other packs."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import merge_nested_dicts
from torch import Tensor

from ...em_core.model.protocol import Conditioning
from .patches import guarded, refusal, refusing

if TYPE_CHECKING:
    from .comfy_host import ComfyHost

OVERRIDE = "optimized_attention_override"


def apply_model(host: ComfyHost, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """Compute x_0 as ComfyUI's samplers do."""
    options = host.model.model_options
    given = {
        "c_crossattn": conditioning.inputs["y"],
        "transformer_options": transformer_options(host, sigma),
    }
    given |= size_conditioning(host, x, conditioning)
    wrapper = options.get("model_function_wrapper")
    run = host.model.model.apply_model
    with refusing(host.model, host.learning, anything=True), expecting_unet(host):
        if wrapper is None:
            return run(x, sigma, **given)
        return wrapper(run, {"input": x, "timestep": sigma, "c": given, "cond_or_uncond": [0]})


@contextmanager
def expecting_unet(host: ComfyHost) -> Iterator[None]:
    """Refuse a patch that runs another module in the UNet's place, or none at all.

    Raises:
        UserError: the UNet whose attention is recorded has not run.
    """
    ran = []
    handle = host.unet.register_forward_pre_hook(lambda module, args: ran.append(True))
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise refusal(host.model, "it runs something else in the UNet's place", host.learning)


def transformer_options(host: ComfyHost, sigma: Tensor) -> dict[str, Any]:
    """Return what the UNet's blocks are told: the graph's patches and what samplers add."""
    options = dict(host.model.model_options["transformer_options"])
    for kind in ("wrappers", "callbacks"):
        registered = getattr(host.model, kind)
        options[kind] = merge_nested_dicts(dict(options.get(kind, {})), registered)
    added = {"cond_or_uncond": [0], "uuids": [uuid.UUID(int=0)], "sigmas": sigma}
    options |= added | {"sample_sigmas": host.sigmas.flip(0)}
    if host.learning:
        options[OVERRIDE] = host.attention
    seed = int(sigma.sum() * 1e6) if host.one_time else 0
    return guarded(options, host.ordinary, seed)


def size_conditioning(host: ComfyHost, x: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
    """Return SDXL's vector of the pooled text and the picture's size; empty for other families."""
    if host.models.family != "sdxl":
        return {}
    height, width = x.shape[-2] * host.models.factor, x.shape[-1] * host.models.factor
    pooled = conditioning.inputs["pooled"]
    if (height, width) not in host.sizes:
        # ComfyUI builds it on the CPU, where the pooled vectors would be waited for in each step.
        blank = torch.zeros(1, pooled.shape[1])
        y = host.model.model.encode_adm(
            pooled_output=blank, height=height, width=width, device=host.device
        )
        host.sizes[height, width] = y[:, pooled.shape[1] :].to(host.device)
    of_size = host.sizes[height, width].expand(len(pooled), -1)
    return {"y": torch.cat([pooled, of_size], dim=1)}
