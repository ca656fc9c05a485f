"""What measures pictures: the protocol of encoders, and the set of them that a user gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError

CLIP_IMAGE, DINO = "clip_image", "dino"
Pictures = Sequence[Float[Tensor, "3 _H _W"]]
"""Pictures of any sizes, RGB in 0..1."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Turns pictures into vectors of length 1, whose scalar product is their cosine similarity."""

    def images(self, pictures: Pictures) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures, on the CPU in float32."""
        ...


@runtime_checkable
class TextImageEncoder(ImageEncoder, Protocol):
    """Turns texts into vectors of the same space too, as CLIP does."""

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts, which are cut at the encoder's length."""
        ...


@runtime_checkable
class PairDistance(Protocol):
    """A distance between pictures of one size, as LPIPS."""

    def __call__(
        self, first: Float[Tensor, "n 3 H W"], second: Float[Tensor, "n 3 H W"]
    ) -> Float[Tensor, " n"]:
        """The distance of each pair of pictures in 0..1."""
        ...


@dataclass(frozen=True)
class Instruments:
    """What there is to measure with; a measure whose encoder is missing is left out.

    Attributes:
        clip: for the agreement of pictures with their prompts.
        looks: measure of identity -> encoder of concepts' crops: "clip_image", "dino". Mixing is judged
            by the last one.
        lpips: for the diversity of pictures; without it, 1 minus DINO's cosine stands in its place.
    """

    clip: TextImageEncoder | None = None
    looks: Mapping[str, ImageEncoder] = field(default_factory=dict)
    lpips: PairDistance | None = None

    def __post_init__(self) -> None:
        if self.clip is None and not self.looks and self.lpips is None:
            raise UserError(
                "There is nothing to measure with. Give at least one encoder: CLIP for the agreement with "
                "prompts and for identity, DINO for identity and diversity, or LPIPS for diversity."
            )

    @property
    def judge(self) -> str | None:
        """The measure of identity that mixing is judged by: DINO's where there is one."""
        return list(self.looks)[-1] if self.looks else None
