"""ViCo's image cross-attention block: pixels look at one another, then at a reference picture.

Source: Hao et al. 2023, arXiv 2306.00971. A block is a whole transformer block whose second attention
reads the features of the reference: self-attention, cross-attention and a gated layer, each on a layer
normalisation of what came before and added to it. It is written as a function of named tensors, so that
what is learned stays in float32 whatever the model computes in.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from .columns import split_heads

Parameters = Mapping[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], Tensor]
"""Queries, keys, values [b, n, c], number of heads, and which keys to see [b, n] -> [b, n, c]."""

OUTPUTS = ("attn1.to_out", "attn2.to_out", "ff.out")


def shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a block's parameters; 20 c^2 + 17 c numbers for c channels."""
    c = channels
    found: dict[str, tuple[int, ...]] = {}
    for number in (1, 2):
        found |= {f"norm{number}.weight": (c,), f"norm{number}.bias": (c,)}
        found |= {f"attn{number}.{name}.weight": (c, c) for name in ("to_q", "to_k", "to_v")}
        found |= {f"attn{number}.to_out.weight": (c, c), f"attn{number}.to_out.bias": (c,)}
    found |= {"norm3.weight": (c,), "norm3.bias": (c,)}
    found |= {"ff.gate.weight": (8 * c, c), "ff.gate.bias": (8 * c,)}
    return found | {"ff.out.weight": (c, 4 * c), "ff.out.bias": (c,)}


def init_block(channels: int, generator: torch.Generator, zero: bool) -> dict[str, Tensor]:
    """Values of a new block: linear layers as PyTorch draws them, normalisations that only normalise.

    Args:
        channels: c.
        generator: of the random values.
        zero: whether what each part adds begins at 0, so that the block changes nothing at first;
            ViCo's blocks begin at random.
    """
    values = {}
    for name, shape in shapes(channels).items():
        layer, _, kind = name.rpartition(".")
        if layer.startswith("norm"):
            values[name] = torch.full(shape, float(kind == "weight"))
        else:
            bound = (4 * channels if layer == "ff.out" else channels) ** -0.5
            drawn = (torch.rand(shape, generator=generator) * 2 - 1) * bound
            values[name] = torch.zeros(shape) if zero and layer in OUTPUTS else drawn
    return values


def attend(
    q: Float[Tensor, "b q c"],
    k: Float[Tensor, "b n c"],
    v: Float[Tensor, "b n c"],
    heads: int,
    seen: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b q c"]:
    """Attention by PyTorch's fused kernels; each sample must see one key at least."""
    mask = None if seen is None else seen[:, None, None, :]
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return rearrange(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)"
    )


def image_attention(
    x: Float[Tensor, "b q c"],
    reference: Float[Tensor, "_b n c"],
    parameters: Parameters,
    heads: int,
    seen: Bool[Tensor, "_b n"] | None = None,
    attention: Attend = attend,
) -> Float[Tensor, "b q c"]:
    """What a block adds to the features x of the pixels; exactly 0 where its outputs are zeros.

    Args:
        x: features after the layer's text block.
        reference: the reference's features at the same place, read as they are: it is the queries that
            are normalised. One for all samples, or one for each.
        parameters: the block's, see :func:`shapes`; they are cast to the type of x.
        heads: number of heads.
        seen: which of the reference's pixels may be looked at; None is all.
        attention: computes it, :func:`attend` or a host's own.
    """
    p = {name: value.to(x) for name, value in parameters.items()}
    reference = reference.to(x).expand(len(x), -1, -1)

    def normalised(y: Tensor, number: int) -> Tensor:
        return F.layer_norm(
            y, y.shape[-1:], p[f"norm{number}.weight"], p[f"norm{number}.bias"], 1e-5
        )

    def attended(y: Tensor, to: Tensor, number: int, mask: Tensor | None) -> Tensor:
        name = f"attn{number}"
        q = F.linear(y, p[f"{name}.to_q.weight"])
        k, v = (F.linear(to, p[f"{name}.{part}.weight"]) for part in ("to_k", "to_v"))
        out = attention(q, k, v, heads, mask)
        return F.linear(out, p[f"{name}.to_out.weight"], p[f"{name}.to_out.bias"])

    y = normalised(x, 1)
    added = attended(y, y, 1, None)
    seen = None if seen is None else seen.expand(len(x), -1)
    added = added + attended(normalised(x + added, 2), reference, 2, seen)
    wide = F.linear(normalised(x + added, 3), p["ff.gate.weight"], p["ff.gate.bias"])
    values, gate = wide.chunk(2, dim=-1)
    return added + F.linear(values * F.gelu(gate), p["ff.out.weight"], p["ff.out.bias"])
