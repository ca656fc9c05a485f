"""A host of some hundred lines: a flow model with joint attention that knows colours by their words.

A pixel attends to the words and to the other pixels at once, by the nearness of colours, and is
predicted to be the mean of what it attends to. That is all; it fulfils the whole protocol.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from em_core.errors import UserError
from em_core.model.adapters import (
    differences_applied,
    trainable_lora,
    trainable_weights,
)
from em_core.model.identity import ModelIdentity
from em_core.model.layers import AttentionLayer
from em_core.model.protocol import Conditioning, TextStream
from em_core.model.recording import AttentionRecorder
from em_core.model.schedules import FlowMatching
from em_core.prompts import ConceptPrompt, ConceptVectors

CHANNELS, FACTOR, SHARPNESS, LAYER = 5, 2, 12.0, "joint"
WORDS = {
    "red": (0.9, 0.2, 0.2),
    "blue": (0.2, 0.2, 0.9),
    "grey": (0.5, 0.5, 0.5),
}
END = (1.0, 1.0, 1.0)


class ToyHost:
    """Latents of five channels at half the picture's size; one layer, one stream called "words"."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.basis = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=g))[0][:, :3]
        self.values = nn.Linear(CHANNELS, CHANNELS, bias=False).requires_grad_(False)
        self.values.weight.data = torch.eye(CHANNELS)
        self.schedule, self.device = FlowMatching(shift=1.5), torch.device("cpu")
        self.image_side, self.image_multiple = 32, FACTOR
        self.recorder: AttentionRecorder | None = None

    def attention_layers(self, latent_size: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        return (AttentionLayer(LAYER, latent_size, stream="words"),)

    def self_attention_layers(self, latent_size: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        return ()

    def encode_image(self, image: Tensor) -> Tensor:
        small = F.avg_pool2d(image / 2 + 0.5, FACTOR)
        return torch.einsum("lc,bchw->blhw", self.basis, small)

    def word(self, colour: Sequence[float]) -> Tensor:
        return self.basis @ torch.tensor(colour)

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        rows, columns, end = [], [], []
        for prompt in prompts:
            row: list[Tensor] = []
            places = {}
            for part in prompt.parts:
                if isinstance(part, str):
                    row += [self.word(WORDS[word]) for word in part.split() if word in WORDS]
                else:
                    of_concept = vectors[part.name]["colours"]
                    places[part.name] = tuple(range(len(row), len(row) + len(of_concept)))
                    row += list(of_concept)
            columns.append(places)
            end.append(len(row))
            rows.append([*row, self.word(END)])
        length = max(map(len, rows))
        y = torch.stack([torch.stack([*r, *[r[-1]] * (length - len(r))]) for r in rows])
        stream = TextStream(length, tuple(columns), tuple(end))
        return Conditioning({"colours": y}, {"words": stream})

    def predict(self, Z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The velocity (Z_s - x_0) / s, x_0 being the attention's mean of words and pixels."""
        s = t.clamp(min=0.02)[:, None, None, None]
        clear = F.avg_pool2d(Z_t, 3, stride=1, padding=1, count_include_pad=False) / (1.02 - s)
        pixels = rearrange(clear, "b c h w -> b (h w) c")
        words = conditioning.inputs["colours"]
        q = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        q = q * SHARPNESS * q.shape[-1] ** 0.5
        k, others = nearness(words), nearness(pixels)
        others[..., -1] = others[..., -1] - 0.5  # a word is nearer than a pixel of its colour
        if self.recorder is not None:
            self.recorder.record(LAYER, q, k, 1, others)
        weights = torch.softmax(q @ torch.cat([k, others], 1).mT * q.shape[-1] ** -0.5, dim=-1)
        x_0 = self.values(weights @ torch.cat([words, pixels], dim=1))
        return (Z_t - rearrange(x_0, "b (h w) c -> b c h w", h=Z_t.shape[-2])) / s

    @contextmanager
    def record_attention(self, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
        self.recorder = recorder
        try:
            yield recorder
        finally:
            self.recorder = None

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        if not words:
            return {"colours": torch.rand(count or 1, 3, generator=generator) @ self.basis.T}
        if words not in WORDS:
            raise UserError(f"This model does not know the word {words!r}.")
        return {"colours": self.word(WORDS[words]).expand(count or 1, -1)}

    def trainable(
        self,
        kind: str,
        values: Mapping[str, Tensor],
        generator: torch.Generator,
        rank: int = 4,
        alpha: float = 4.0,
    ):  # type: ignore[no-untyped-def]
        if kind == "lora":
            return trainable_lora({"values": self.values}, values, generator, rank, alpha)
        return trainable_weights({"values.weight": self.values.weight}, values)

    def applied(self, weights: Mapping[str, Tensor], lora_scale: float):  # type: ignore[no-untyped-def]
        return differences_applied({"values.weight": self.values.weight}, weights)

    @torch.no_grad()
    def draw(self, prompt: ConceptPrompt, vectors: ConceptVectors, seeds: Sequence[int]) -> Tensor:
        """Euler steps from noise to a picture."""
        side = self.image_side // FACTOR
        noise = [
            torch.randn(CHANNELS, side, side, generator=torch.Generator().manual_seed(n))
            for n in seeds
        ]
        Z, conditioning = torch.stack(noise), self.encode_prompts([prompt] * len(noise), vectors)
        for s in torch.linspace(1, 0.05, 20):
            Z = Z - self.predict(Z, s.expand(len(Z)), conditioning) * 0.05
        picture = torch.einsum("lc,blhw->bchw", self.basis, Z).clamp(0, 1)
        return F.interpolate(picture, scale_factor=FACTOR)

    def identity(self) -> ModelIdentity:
        return ModelIdentity.of_weights(
            "toy", {"colours": CHANNELS}, dict(self.values.named_parameters())
        )


def nearness(colours: Tensor) -> Tensor:
    """Keys k of colours c, such that (z, 1) k = z c - |c|^2 / 2: largest for the colour nearest to z."""
    return torch.cat([colours, -0.5 * colours.square().sum(dim=-1, keepdim=True)], dim=-1)
