"""Start vectors of concepts."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor


def random_vectors(
    table: Float[Tensor, "v d"], count: int, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """Gaussian vectors with the token table's mean and deviation (VCD: "simply random vector").

    Rows of zeros stand for pieces that the model never saw; they do not count.
    """
    used = table[reduce(table.abs(), "v d -> v", "max") > 0]
    noise = torch.randn(count, table.shape[1], generator=generator).to(table)
    return used.mean(dim=0) + noise * used.std(dim=0)


def spread_pieces(pieces: Float[Tensor, "p d"], count: int) -> Float[Tensor, "n d"]:
    """`count` vectors from p pieces: means of neighbouring pieces where p > count, repeats where p < count."""
    if len(pieces) >= count:
        return torch.stack([group.mean(dim=0) for group in torch.tensor_split(pieces, count)])
    return pieces[torch.arange(count) % len(pieces)]
