"""Attention probabilities of chosen prompt columns (VCD Eq. 2, softmax part)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from .layers import map_size


def select_columns(
    columns: Sequence[Sequence[Sequence[int]]],
    length: int,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b k t"]:
    """Averaging weights over prompt positions, per sample and concept.

    `columns[b][k]` lists the positions of concept k in prompt b; an empty list gives a zero row,
    hence a zero map (a concept that does not stand in this prompt).
    """
    select = torch.zeros(len(columns), max(map(len, columns), default=0), length, device=device)
    for b, of_prompt in enumerate(columns):
        for k, positions in enumerate(of_prompt):
            for position in positions:
                select[b, k, position] += 1 / len(positions)
    return select


def column_probabilities(
    q: Float[Tensor, "b q c"],
    k: Float[Tensor, "b t c"],
    select: Float[Tensor, "_b k _t"],
    heads: int,
    latent_size: tuple[int, int],
) -> Float[Tensor, "b k h w"]:
    """Cross-attention probabilities of the selected columns, averaged over heads (VCD Eq. 2)."""
    q = rearrange(q, "b q (heads d) -> b heads q d", heads=heads)
    k = rearrange(k, "b t (heads d) -> b heads t d", heads=heads)
    logits = einsum(
        q.float() * q.shape[-1] ** -0.5, k.float(), "b heads q d, b heads t d -> b heads q t"
    )
    # A patch may append tokens of its own to the text's: they take part in the softmax alone.
    select = F.pad(select, (0, logits.shape[-1] - select.shape[-1]))
    weights = repeat_batch(select, q.shape[0]) / heads
    maps = einsum(logits.softmax(dim=-1), weights, "b heads q t, b k t -> b k q")
    height, width = map_size(q.shape[2], latent_size)
    return rearrange(maps, "b k (h w) -> b k h w", h=height, w=width)


def repeat_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat the first axis to `batch`: a host may run several chunks (cond, uncond) in one call."""
    return x if x.shape[0] == batch else x.repeat(batch // x.shape[0], *[1] * (x.ndim - 1))
