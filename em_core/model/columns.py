"""Attention probabilities of chosen text columns (VCD Eq. 2, softmax part).

In cross-attention the pixels' softmax runs over the text alone. In joint attention (Esser et al.
2024, arXiv 2403.03206; SD3, Flux) the image's own tokens share it, and a softmax over them is far
too large to keep: only its normalizer is computed, some rows of queries at a time, and computed
again in the backward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20


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


def repeat_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat the first axis to `batch`: a host may run several chunks (cond, uncond) in one call."""
    return x if x.shape[0] == batch else x.repeat(batch // x.shape[0], *[1] * (x.ndim - 1))


def column_probabilities(
    q: Float[Tensor, "b q c"],
    k: Float[Tensor, "b t c"],
    select: Float[Tensor, "_b k _t"],
    heads: int,
    others: Float[Tensor, "b n c"] | None = None,
    chunk: int = CHUNK_BYTES,
) -> Float[Tensor, "b k q"]:
    """Attention probabilities of the selected text columns, averaged over heads, in float32.

    This is softmax(q k^T / sqrt(c / heads)) of VCD Eq. 2. Gradients reach `q`, `k` and `others`
    in the types of these; none reaches `select`.

    Args:
        q: queries of the pixels, as projected; c holds the heads one after another.
        k: keys of the text, on which a patch may have appended tokens of its own (t >= _t). They
            take part in the softmax alone.
        select: averaging weights over text positions, see :func:`select_columns`. A host may
            run several chunks in one call: b is a multiple of _b.
        heads: number of heads.
        others: further keys in the same softmax, those of the image in joint attention
            (arXiv 2403.03206). None means cross-attention: the softmax is over the text alone.
        chunk: most bytes that the logits over `others` may take at a time; has no bearing on
            cross-attention.

    Returns:
        The probabilities, values in 0..1; without `others` and with all columns selected once
        they sum to 1 over k.

    Raises:
        einops.EinopsError: c is no multiple of `heads`.
    """
    queries = split_heads(q, heads).float() * (q.shape[-1] // heads) ** -0.5
    keys = split_heads(k, heads)
    if others is None:
        return _over_text(queries, keys, select)
    return _over_both(queries, keys, split_heads(others, heads), select, chunk)


def split_heads(x: Float[Tensor, "b n c"], heads: int) -> Float[Tensor, "b _heads n d"]:
    """The heads of a projection, which stand one after another on its last axis, as an axis.

    Raises:
        einops.EinopsError: c is no multiple of `heads`.
    """
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def logsumexp_over(
    q: Float[Tensor, "b heads q d"], keys: Float[Tensor, "b heads n d"], chunk: int = CHUNK_BYTES
) -> Float[Tensor, "b heads q"]:
    """log sum_n exp(q . keys_n), without ever holding the [b, heads, q, n] logits.

    They come by as many rows of queries as fit in `chunk` bytes, but at least one row, and come
    again in the backward pass. All is computed in float32, or float64 where `q` is, also under
    autocast. Gradients have the types of `q` and `keys`; they can not be differentiated again.
    Queries are taken as they are: scale them by d**-0.5 for attention.
    """
    return _LogSumExp.apply(q, keys, chunk)


def _over_text(q: Tensor, k: Tensor, select: Tensor) -> Tensor:
    """The probabilities in cross-attention, for scaled queries [b, heads, q, d]."""
    logits = einsum(q, k.float(), "b heads q d, b heads t d -> b heads q t")
    # A patch may append tokens of its own to the text's: they take part in the softmax alone.
    select = F.pad(select, (0, logits.shape[-1] - select.shape[-1]))
    weights = repeat_batch(select, q.shape[0]) / q.shape[1]
    return einsum(logits.softmax(dim=-1), weights, "b heads q t, b k t -> b k q")


def _over_both(q: Tensor, k: Tensor, others: Tensor, select: Tensor, chunk: int) -> Tensor:
    """The probabilities in joint attention, for scaled queries [b, heads, q, d]."""
    k = k.float()  # once, so that the two gradients of k, which nearly cancel, add up in float32
    # Prompts of joint attention are long (512 tokens in Flux) and few of their columns selected.
    used = select.any(dim=0).any(dim=0).nonzero().squeeze(1)
    weights = repeat_batch(select[..., used], q.shape[0]) / q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        total = torch.logaddexp(logsumexp_over(q, k, chunk), logsumexp_over(q, others, chunk))
        logits = einsum(q, k[:, :, used], "b heads q d, b heads t d -> b heads q t")
        return einsum((logits - total[..., None]).exp(), weights, "b heads q t, b k t -> b k q")


class _LogSumExp(torch.autograd.Function):
    """The function and gradient behind :func:`logsumexp_over`; saves its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, chunk: int) -> Tensor:
        merged = _merge_heads(keys, q)
        # Filled part by part: a list of parts would pin memory in between the chunks' own.
        total = merged.new_empty(q.shape[:3])
        ctx.rows = _rows_per_chunk(merged, chunk)
        with torch.autocast(q.device.type, enabled=False):
            for part, part_total in zip(
                q.split(ctx.rows, dim=2), total.split(ctx.rows, dim=2), strict=True
            ):
                logsumexp = _logsumexp_(_merge_heads(part, q) @ merged.mT)
                part_total.copy_(logsumexp.view(part_total.shape))
        ctx.save_for_backward(q, keys, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, keys, total = ctx.saved_tensors
        merged = _merge_heads(keys, q)
        grad_q, grad_keys = torch.empty_like(q), torch.zeros_like(merged)
        split = (x.split(ctx.rows, dim=2) for x in (q, total[..., None], grad[..., None], grad_q))
        with torch.autocast(q.device.type, enabled=False):
            for part, part_total, part_grad, part_grad_q in zip(*split, strict=True):
                queries = _merge_heads(part, q)
                weights = (queries @ merged.mT).sub_(_merge_heads(part_total, q)).exp_()
                weights.mul_(_merge_heads(part_grad, q))
                part_grad_q.copy_((weights @ merged).view(part.shape))
                grad_keys.baddbmm_(weights.mT, queries)
                del weights  # else it would live on beside the next chunk's
        return grad_q, grad_keys.view(keys.shape).to(keys.dtype), None


def _merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """[b, heads, n, d] as [b * heads, n, d], contiguous, in the type of `like` or float32."""
    merged = rearrange(x, "b heads n d -> (b heads) n d")
    return merged.to(torch.promote_types(like.dtype, torch.float32)).contiguous()


def _rows_per_chunk(merged: Tensor, chunk: int) -> int:
    """How many queries' logits over the keys [b * heads, n, d] fit in `chunk` bytes, at least 1."""
    row_bytes = merged.shape[0] * merged.shape[1] * merged.element_size()
    return max(1, chunk // max(1, row_bytes))


def _logsumexp_(logits: Tensor) -> Tensor:
    """Logsumexp over the last axis, in the memory of `logits`: torch's takes as much again."""
    peak = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(peak).exp_().sum(dim=-1).log_().add_(peak.squeeze(-1))
