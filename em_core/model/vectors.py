"""Start vectors of concepts."""

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError


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
    """`count` vectors from p pieces: means of neighbouring pieces where p > count, repeats where p < count.

    Raises:
        UserError: the model never saw these pieces; their vectors are 0.
    """
    if not pieces.any():
        raise UserError("The model was never taught these words: their vectors are 0. Use others.")
    if len(pieces) >= count:
        return torch.stack([group.mean(dim=0) for group in torch.tensor_split(pieces, count)])
    return pieces[torch.arange(count) % len(pieces)]
