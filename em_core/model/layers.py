"""The attention layers that read the text, and which of them masks and losses are read from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..masks.resizing import Size

LOSS_SIDE = 16
REGION_SIDE = 32


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer of a model at one size of latents.

    Attributes:
        name: unique within the model.
        size: height and width of its attention map.
        localises: whether its maps tell where things are. The innermost block of a UNet does not
            (Break-a-Scene reads the others alone); only VCD's mean over all layers includes it.
        stream: the sequence of text tokens that it reads; see `Conditioning`.
    """

    name: str
    size: Size
    localises: bool = True
    stream: str = "text"

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


def loss_layers(layers: Sequence[AttentionLayer]) -> tuple[str, ...]:
    """The layers of the size nearest to 16x16 (Break-a-Scene's choice for Eq. 4)."""
    sizes = [layer.size for layer in layers if layer.localises]
    best = min(sizes, key=lambda size: abs((size[0] * size[1]) ** 0.5 - LOSS_SIDE), default=None)
    return names_of(layers, lambda layer: layer.localises and layer.size == best)


def mask_layers(layers: Sequence[AttentionLayer], all_layers: bool) -> tuple[str, ...]:
    """The layers that masks are read from: all (VCD), or those at least as fine as the loss's."""
    if all_layers:
        return names_of(layers, lambda layer: True)
    of_loss = set(loss_layers(layers))
    least = min(layer.pixels for layer in layers if layer.name in of_loss)
    return names_of(layers, lambda layer: layer.localises and layer.pixels >= least)


def region_layers(layers: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
    """The self-attention layers that regions are read from: the finest of 32x32 cells or fewer."""
    fit = [layer for layer in layers if layer.localises and layer.pixels <= REGION_SIDE**2]
    most = max((layer.pixels for layer in fit), default=0)
    return tuple(layer for layer in fit if layer.pixels == most)


def finest_size(layers: Sequence[AttentionLayer]) -> Size:
    """The size at which maps of several layers are averaged: that of the finest."""
    return max(layers, key=lambda layer: layer.pixels).size


def names_of(
    layers: Sequence[AttentionLayer], keep: Callable[[AttentionLayer], bool]
) -> tuple[str, ...]:
    """Names of the layers that `keep` accepts, in the model's order.

    Raises:
        ValueError: none is accepted.
    """
    names = tuple(layer.name for layer in layers if keep(layer))
    if not names:
        raise ValueError(f"No attention layer left of {[layer.name for layer in layers]}.")
    return names


def halved(size: Size, times: int) -> Size:
    """A size after `times` convolutions of stride 2, each of which rounds up."""
    height, width = size
    for _ in range(times):
        height, width = -(-height // 2), -(-width // 2)
    return height, width


def size_of_map(pixels: int, nominal: Size) -> Size:
    """The size of a map of so many pixels in a layer of `nominal` size.

    A patch may have shrunk the layer's input by halves.

    Raises:
        ValueError: no number of halvings gives so many pixels.
    """
    size = nominal
    while size[0] * size[1] > pixels and size != (1, 1):
        size = halved(size, 1)
    if size[0] * size[1] != pixels:
        raise ValueError(
            f"Bad attention map. Expected a halving of {nominal}, got {pixels} pixels."
        )
    return size
