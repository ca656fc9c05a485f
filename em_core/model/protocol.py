"""The protocol of a diffusion model: all that the method needs to know of a host."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..masks.resizing import Size
from ..prompts import ConceptPrompt, ConceptVectors
from ..settings import WeightKind
from .adapters import TrainableParts
from .identity import ModelIdentity
from .layers import AttentionLayer
from .recording import AttentionRecorder
from .schedules import NoiseSchedule
from .visual import Act, Place


@dataclass(frozen=True)
class TextStream:
    """Where the concepts stand in one sequence of text tokens that attention layers read.

    Attributes:
        length: tokens of the sequence.
        columns: per prompt, concept name -> positions at which its vectors stand.
        end: per prompt, the position of the first end-of-text token.
    """

    length: int
    columns: tuple[Mapping[str, tuple[int, ...]], ...]
    end: tuple[int, ...]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        inputs: name -> tensor with leading axis b, for nobody but the host that made them.
        streams: name -> where the concepts stand. A model with one sequence calls it "text".
    """

    inputs: Mapping[str, Tensor]
    streams: Mapping[str, TextStream]

    def rows(self, index: Sequence[int]) -> "Conditioning":
        """The conditioning with its prompts chosen, repeated or reordered by `index`."""
        i = list(index)
        streams = {
            name: replace(
                stream,
                columns=tuple(stream.columns[j] for j in i),
                end=tuple(stream.end[j] for j in i),
            )
            for name, stream in self.streams.items()
        }
        # Not by the list, which would have to be moved to the device first.
        inputs = {name: torch.stack([x[j] for j in i]) for name, x in self.inputs.items()}
        return Conditioning(inputs, streams)


@runtime_checkable
class DiffusionModel(Protocol):
    """A text-to-image model of the latent diffusion or flow kind, as a host presents it.

    A host may also have `loss_scale` and `passes_at_once`; see the functions of these names.
    """

    schedule: NoiseSchedule
    device: torch.device
    image_side: int
    """Side in pixels of the pictures that the model was made for."""
    image_multiple: int
    """Sides of pictures must be a multiple of this."""

    def attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        """The attention layers that read text, in the model's order, for latents of this size."""
        ...

    def self_attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        """The layers in which pixels attend to one another, as :meth:`attention_layers`.

        The recorder's `among` names those to record. A host that can not record them gives none;
        regions are then not looked for.
        """
        ...

    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Scaled latents (posterior means) of pictures in -1..1; any number of channels c."""
        ...

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts with the concepts' vectors in place; differentiable in the vectors."""
        ...

    def predict(
        self, Z_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """The model's output in float32: an estimate of the schedule's target."""
        ...

    def record_attention(
        self, recorder: AttentionRecorder
    ) -> AbstractContextManager[AttentionRecorder]:
        """Let the recorder see the attention layers while the context is open."""
        ...

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "_ _"]]:
        """Encoder name -> start vectors [n, d] from `words`, random ones where `words` is empty.

        There are `count` of them, or with None as many as the words have pieces. Encoders may
        differ in both n and d.
        """
        ...

    def trainable(
        self,
        kind: WeightKind,
        values: Mapping[str, Tensor],
        generator: torch.Generator,
        rank: int = 4,
        alpha: float = 4.0,
    ) -> AbstractContextManager[TrainableParts]:
        """Parts that act in the model and can be learned while the context is open.

        The model is as it was afterwards, also after an exception.

        Args:
            kind: what is learned: "lora", "cross_attention" (keys and values) or "full".
            values: of the parts' parameters, from an earlier context; empty for a fresh start.
            generator: of the random values of a fresh start.
            rank, alpha: of a LoRA, whose output is scaled by alpha / rank.
        """
        ...

    def applied(
        self, weights: Mapping[str, Tensor], lora_scale: float
    ) -> AbstractContextManager[None]:
        """Let learned weights (what :meth:`TrainableParts.learned` gave) act in the model."""
        ...

    def draw(
        self, prompt: ConceptPrompt, vectors: ConceptVectors, seeds: Sequence[int]
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in 0..1, one per seed, by the host's own sampler."""
        ...

    def identity(self) -> ModelIdentity:
        """Identity of the base model."""
        ...


@runtime_checkable
class VisualModel(DiffusionModel, Protocol):
    """A model in which image attention can act: one whose transformers read text block by block."""

    def image_places(self, latent_size: Size) -> tuple[Place, ...]:
        """ViCo's places for latents of this size, in the model's order."""
        ...

    def transformed(self, places: Sequence[Place], act: Act) -> AbstractContextManager[None]:
        """Let `act` change what the text blocks at these places give while the context is open."""
        ...


def visual_model(host: DiffusionModel) -> VisualModel:
    """The host as one in which image attention can act.

    Raises:
        UserError: it is none.
    """
    if not isinstance(host, VisualModel):
        raise UserError(
            "This model has no places for image attention. Expected Stable Diffusion 1.x, 2.x or SDXL."
        )
    return host


def loss_scale(host: DiffusionModel) -> float:
    """What losses are multiplied by before the backward pass, so that gradients do not vanish in a
    narrow number type; they are divided by it again. 1 where the host does not say."""
    return getattr(host, "loss_scale", 1.0)


def passes_at_once(host: DiffusionModel, most: int) -> int:
    """How many of at most `most` passes without gradients go through the model together: as many as
    the host says that memory allows."""
    return max(1, min(most, getattr(host, "passes_at_once", most)))


def to_host(x: Tensor, host: DiffusionModel) -> Tensor:
    """A tensor from the CPU on the host's device, without waiting for what the device is busy with."""
    # Elsewhere than in CUDA, copies that are not waited for have been wrong.
    return x.to(host.device, non_blocking=host.device.type == "cuda")
