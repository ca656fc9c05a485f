"""Start vectors of concepts."""

from dataclasses import dataclass

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True)
class TableStatistics:
    """Mean and standard deviation of a token table over its pieces, for random vectors like them."""

    mean: Float[Tensor, " d"]
    std: Float[Tensor, " d"]

    @classmethod
    def of(cls, table: Float[Tensor, "v d"]) -> "TableStatistics":
        """Rows of zeros stand for pieces that the model never saw; they do not count."""
        used = table[reduce(table.abs(), "v d -> v", "max") > 0]
        return cls(used.mean(dim=0), used.std(dim=0))

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Gaussian vectors like the table's (VCD: "simply random vector")."""
        noise = torch.randn(count, len(self.mean), generator=generator).to(self.mean)
        return self.mean + noise * self.std


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
