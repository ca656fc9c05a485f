"""Differences of whole weights as low-rank factors, by a truncated singular value decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..model.adapters import DIFF, DOWN, UP

OVERSAMPLING, ITERATIONS = 16, 6


@dataclass(frozen=True)
class LowRank:
    """Differences of weights as factors.

    Attributes:
        weights: `<layer>.lora_down` [r, i] or [r, i, kh, kw], and `<layer>.lora_up` [o, r].
        error: what the factors leave out, as a share of the difference of all weights (0..1): the
            root of the ratio of the sums of squares.
        left_out: weights that have no factors: biases, norms, embeddings.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    error: float = 0.0
    left_out: tuple[str, ...] = ()


def low_rank(differences: Mapping[str, Tensor], rank: int) -> LowRank:
    """Return the factors of rank `rank` that are nearest to each matrix (Eckart and Young 1936).

    They are found by random projections (Halko et al. 2011, Algorithm 4.4) with a fixed seed. Layers of
    fewer rows or columns get zeros up to the rank of the others: diffusers mistakes alphas that differ.

    Args:
        differences: `<path>.weight.diff` or `<path>.bias.diff` of each weight.
        rank: the most that a layer's factors may have.
    """
    fitting = {n: x.detach().float() for n, x in differences.items() if takes_factors(n, x)}
    most = max((min(x.flatten(1).shape) for x in fitting.values()), default=0)
    weights: dict[str, Tensor] = {}
    left = 0.0
    for name, difference in fitting.items():
        down, up = factors(difference, min(rank, most))
        path = name.removesuffix(f".weight{DIFF}")
        weights |= {path + DOWN: down, path + UP: up}
        left += squares(difference.flatten(1) - up @ down.flatten(1))
    left_out = {n: x for n, x in differences.items() if n not in fitting}
    whole = sum(map(squares, differences.values()))
    left += sum(map(squares, left_out.values()))
    names = tuple(name.removesuffix(DIFF) for name in left_out)
    return LowRank(weights, (left / whole) ** 0.5 if whole else 0.0, names)


def takes_factors(name: str, difference: Tensor) -> bool:
    """Return whether LoRA files know this weight: matrices and kernels in a UNet's blocks and a text
    encoder's layers."""
    if not name.endswith(f".weight{DIFF}") or difference.ndim not in (2, 4):
        return False
    unet = ("diffusion_model.", "unet.")
    return "block" in name if name.startswith(unet) else ".encoder.layers." in name


def squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def factors(
    difference: Float[Tensor, "o i *k"], rank: int
) -> tuple[Float[Tensor, "r i *k"], Float[Tensor, "o r"]]:
    """Return the factors down and up of a matrix, or of a convolution's kernel, of equal norms."""
    matrix = difference.flatten(1)
    found = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(matrix, min(found + OVERSAMPLING, *matrix.shape), ITERATIONS)
    root = S[:found].sqrt()
    down = F.pad(rearrange(V[:, :found] * root, "i r -> r i"), (0, 0, 0, rank - found))
    up = F.pad(U[:, :found] * root, (0, rank - found))
    return down.reshape(rank, *difference.shape[1:]).contiguous(), up.contiguous()
