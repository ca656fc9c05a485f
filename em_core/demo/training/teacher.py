"""The attention teacher: at this size, where the nouns' attention goes has to be taught.

Large models come to localise nouns by scale; this one is told. Every taught layer gets its own
loss, so that no single layer carries the localisation.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from jaxtyping import Float
from torch import Tensor, nn

TAUGHT_LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
)


@dataclass
class TaughtColumns:
    """Prompt columns of interest, and the maps that the taught layers leave here in a forward."""

    select: Float[Tensor, "b k t"]
    maps: list[Float[Tensor, "b k q"]] = field(default_factory=list)


class TaughtAttention:
    """Cross-attention with explicit probabilities; keeps their mean over heads (VCD Eq. 2)."""

    def __init__(self) -> None:
        self.columns: TaughtColumns | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b q c"],
        encoder_hidden_states: Float[Tensor, "b t d"],
        attention_mask: None = None,
        temb: None = None,
    ) -> Float[Tensor, "b q c"]:
        b, n, _ = hidden_states.shape
        q, k, v = (
            layer(x).view(b, -1, attn.heads, layer.out_features // attn.heads).transpose(1, 2)
            for layer, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        A = ((q * attn.scale) @ k.transpose(-1, -2)).softmax(dim=-1)
        if self.columns is not None:
            mean = A.mean(dim=1).float()
            self.columns.maps.append(self.columns.select @ mean.transpose(-1, -2))
        out = (A.to(v.dtype) @ v).transpose(1, 2).reshape(b, n, -1)
        return attn.to_out[1](attn.to_out[0](out))


def teach(unet: nn.Module) -> list[TaughtAttention]:
    """Give the taught layers their processors, in network order."""
    processors = []
    for name in TAUGHT_LAYERS:
        processor = TaughtAttention()
        attention = unet.get_submodule(name)
        if not isinstance(attention, Attention):
            raise TypeError(
                f"Expected an attention layer at {name}, got {type(attention).__name__}."
            )
        attention.set_processor(processor)  # type: ignore[arg-type]
        processors.append(processor)
    return processors


def attention_loss(
    maps: list[Float[Tensor, "b k q"]],
    target: Float[Tensor, "b k 16 16"],
    weight: Float[Tensor, "b k"],
) -> Float[Tensor, ""]:
    """Sum over layers of ||A / max(A) - M||^2 (mean over pixels), weighted, mean over the batch.

    `target` is the share of each map pixel that the object's visible mask covers.
    """
    total = torch.zeros(())
    for A in maps:
        side = int(A.shape[-1] ** 0.5)
        M = target if side == target.shape[-1] else F.avg_pool2d(target, target.shape[-1] // side)
        near = A / A.amax(dim=-1, keepdim=True).clamp_min(1e-6)
        error = (near - M.flatten(2)).square().mean(dim=-1)
        total = total + (weight * error).sum() / weight.shape[0]
    return total
