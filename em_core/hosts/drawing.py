"""Pictures by diffusers' own sampling loop, and its VAE in a range that it can compute in."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..masks.resizing import Size
from ..model.visual_drawing import VisualUse
from ..prompts import ConceptPrompt, ConceptVectors
from .visual import looking


@contextmanager
def in_full_range(vae: Any) -> Iterator[None]:
    """Let a VAE that float16 is too narrow for compute in float32 while the context is open."""
    narrow = vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        if narrow:
            vae.to(torch.float32)
        yield
    finally:
        if narrow:
            vae.to(torch.float16)


@torch.no_grad()
def draw(
    host: Any,
    prompt: ConceptPrompt,
    vectors: ConceptVectors,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    size: Size,
    visual: VisualUse | None,
) -> Float[Tensor, "b 3 H W"]:
    """Draw pictures in 0..1, one per seed, with the diffusers host's pipeline and scheduler."""
    conditioning = host.encode_prompts([ConceptPrompt(()), prompt], vectors)
    encoded = conditioning.inputs
    names = {"y": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    given = {}
    for kind, (empty, x) in encoded.items():
        away = torch.zeros_like(empty) if host.zero_empty else empty
        given[names[kind]] = torch.stack([x] * len(seeds)).to(host.dtype)
        given[f"negative_{names[kind]}"] = torch.stack([away] * len(seeds)).to(host.dtype)
    height, width = size
    with looking(host, visual, conditioning, len(seeds)), warnings.catch_warnings():
        # Of diffusers' own pipeline, about its own VAE in float16.
        warnings.filterwarnings("ignore", "`upcast_vae` is deprecated", FutureWarning)
        pictures = host.pipeline(
            **given,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            output_type="pt",
        ).images
    return pictures.float()
