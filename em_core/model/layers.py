"""The cross-attention layers of a model, and which of them masks and losses are read from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOSS_SIDE = 16


@dataclass(frozen=True)
class CrossAttentionLayer:
    """A cross-attention layer of a UNet: `downscale` is latent side / map side (1, 2, 4, 8)."""

    name: str
    downscale: int
    stage: str

    def __post_init__(self) -> None:
        if self.stage not in ("down", "mid", "up"):
            raise ValueError(
                f"Bad stage of layer {self.name}. Expected down, mid or up, got {self.stage}."
            )


def map_size(queries: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an attention map with `queries` pixels over a latent of `latent_size`.

    UNets halve with stride-2 convolutions, so each side is rounded up at every halving.

    Raises:
        ValueError: no number of halvings gives `queries` pixels.
    """
    height, width = latent_size
    while height * width > queries and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != queries:
        raise ValueError(
            f"Bad attention map. Expected a halving of {latent_size}, got {queries} pixels."
        )
    return height, width


def choose_layers(
    layers: Sequence[CrossAttentionLayer], keep: Callable[[CrossAttentionLayer], bool]
) -> tuple[str, ...]:
    """Names of the layers that `keep` accepts, in network order.

    Raises:
        ValueError: none is accepted.
    """
    names = tuple(layer.name for layer in layers if keep(layer))
    if not names:
        raise ValueError(f"No cross-attention layer left of {[layer.name for layer in layers]}.")
    return names


def loss_layers(
    layers: Sequence[CrossAttentionLayer], latent_size: tuple[int, int]
) -> tuple[str, ...]:
    """Down and up layers whose maps are nearest to 16x16 (Break-a-Scene's choice for Eq. 4)."""
    side = (latent_size[0] * latent_size[1]) ** 0.5
    scales = {layer.downscale for layer in layers if layer.stage != "mid"}
    best = min(scales, key=lambda scale: abs(side / scale - LOSS_SIDE))
    return choose_layers(layers, lambda layer: layer.downscale == best and layer.stage != "mid")


def mask_layers(
    layers: Sequence[CrossAttentionLayer], latent_size: tuple[int, int], all_layers: bool
) -> tuple[str, ...]:
    """Layers that masks are read from: all, or those at least as fine as the loss's."""
    if all_layers:
        return choose_layers(layers, lambda layer: True)
    coarsest = set(loss_layers(layers, latent_size))
    limit = max(layer.downscale for layer in layers if layer.name in coarsest)
    return choose_layers(layers, lambda layer: layer.downscale <= limit and layer.stage != "mid")


def map_side(
    latent_size: tuple[int, int], layers: Sequence[CrossAttentionLayer]
) -> tuple[int, int]:
    """Size at which maps are averaged: that of the finest layer."""
    finest = min(layer.downscale for layer in layers)
    return -(-latent_size[0] // finest), -(-latent_size[1] // finest)
