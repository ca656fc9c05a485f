"""Pictures by ComfyUI's own sampler, from a host's models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...em_core.prompts import ConceptPrompt, ConceptVectors

if TYPE_CHECKING:
    from .comfy_host import ComfyHost


@torch.no_grad()
def draw(
    host: ComfyHost,
    prompt: ConceptPrompt,
    vectors: ConceptVectors,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
) -> Float[Tensor, "b 3 H W"]:
    """Draw pictures in 0..1, one per seed, with ComfyUI's Euler sampler."""
    import comfy.sample

    conds = [
        sampler_conditioning(host, text, known)
        for text, known in ((prompt, vectors), (ConceptPrompt(()), {}))
    ]
    side = host.image_side // host.models.factor
    latents = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, host.models.channels, side, side, generator=generator)
        latent = comfy.sample.sample(
            host.model, noise, steps, guidance, "euler", "normal", *conds, torch.zeros_like(noise),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        latents.append(latent)
    with host.vae_in_use() as vae:
        pictures = [vae.decode(latent) for latent in latents]
    return torch.cat([rearrange(each, "b h w c -> b c h w").clone() for each in pictures])


def sampler_conditioning(host: ComfyHost, prompt: ConceptPrompt, vectors: ConceptVectors) -> list:
    """Return a CONDITIONING, as ComfyUI's samplers take it."""
    encoded = host.encode_prompts([prompt], vectors)
    return [[encoded.inputs["y"], {"pooled_output": encoded.inputs.get("pooled")}]]
