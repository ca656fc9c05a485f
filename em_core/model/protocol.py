"""The protocol of a latent diffusion model: all that the method needs to know of a host."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..prompts import ConceptPrompt, ConceptVectors
from .layers import CrossAttentionLayer
from .recording import AttentionRecorder
from .schedules import NoiseSchedule


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        y: [b, t, d] the sequence that cross-attention reads.
        columns: per prompt, concept name -> positions in `y` at which its vectors stand.
        end: per prompt, the position of the first end-of-text token.
        extra: further tensors with leading axis b that the host's UNet needs (SDXL's pooled vector).
    """

    y: Float[Tensor, "b t d"]
    columns: tuple[Mapping[str, tuple[int, ...]], ...]
    end: tuple[int, ...]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, index: Sequence[int]) -> "Conditioning":
        """The conditioning with its prompts chosen, repeated or reordered by `index`."""
        i = list(index)
        return Conditioning(
            y=self.y[i],
            columns=tuple(self.columns[j] for j in i),
            end=tuple(self.end[j] for j in i),
            extra={name: x[i] for name, x in self.extra.items()},
        )


@dataclass(frozen=True)
class ModelIdentity:
    """What a concept file remembers of its base model.

    Attributes:
        family: readable name of the architecture, such as "sd1" or "sdxl".
        architecture: hash of the names and shapes of all weights.
        encoders: text encoder name -> width of its token vectors.
        sample: [s] values read at fixed places of the weights; tells fine-tunes apart.
    """

    family: str
    architecture: str
    encoders: Mapping[str, int]
    sample: Float[Tensor, " s"]


@runtime_checkable
class DiffusionModel(Protocol):
    """A text-to-image latent diffusion model, as a host presents it."""

    schedule: NoiseSchedule
    layers: tuple[CrossAttentionLayer, ...]
    device: torch.device
    image_side: int
    """Side in pixels of the pictures that the model was made for."""
    image_multiple: int
    """Picture sides must be a multiple of this."""

    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Scaled latent (posterior mean) of pictures in -1..1."""
        ...

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts with the concepts' vectors in place; differentiable in the vectors."""
        ...

    def predict_noise(
        self, Z_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Output of the UNet: eps, or v where the schedule says so."""
        ...

    def record_attention(
        self, recorder: AttentionRecorder
    ) -> AbstractContextManager[AttentionRecorder]:
        """Let the recorder see all cross-attention layers while the context is open."""
        ...

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Encoder name -> start vectors from `words`, or random ones where `words` is empty.

        There are `count` of them; None: as many as the words have pieces.
        """
        ...

    def adaptable_layers(self) -> Mapping[str, nn.Linear]:
        """Path -> linear layers that a LoRA acts on (attention of UNet and text encoders)."""
        ...

    def weights(self, kind: Literal["cross_attention", "full"]) -> Mapping[str, nn.Parameter]:
        """Path -> weights of the joint phase: keys and values of cross-attention, or all."""
        ...

    def generate(
        self, prompt: ConceptPrompt, vectors: ConceptVectors, seeds: Sequence[int]
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in 0..1, one per seed, by the host's own sampler."""
        ...

    def identity(self) -> ModelIdentity:
        """Identity of the base model."""
        ...
