"""Gradient checkpointing of a UNet's blocks, which saves memory at the cost of time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward` that is recomputed in the backward pass instead of keeping its activations."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "transformer_options" in kwargs:
            # ComfyUI keeps the current block's place in this dict; the recomputation needs it as it is now.
            kwargs["transformer_options"] = dict(kwargs["transformer_options"])
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@contextmanager
def checkpointing(unet: nn.Module, on: bool) -> Iterator[None]:
    """Checkpoint the UNet's residual and transformer blocks while the context is open."""
    blocks = [
        module for module in unet.modules() if isinstance(module, (BasicTransformerBlock, ResBlock))
    ]
    try:
        for block in blocks if on else ():
            block.forward = checkpointed(block.forward)
        yield
    finally:
        for block in blocks if on else ():
            block.__dict__.pop("forward", None)
