"""Recording and aggregating the cross-attention of concept columns (VCD Eq. 2, softmax part).

A host calls :meth:`AttentionRecorder.record` with the queries and keys of a cross-attention layer
as they pass. Only the columns of the concepts are kept, averaged over heads; the attention output
itself is computed elsewhere, by whatever kernel the host uses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

AttentionMaps = dict[str, Tensor]


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


def select_columns(
    columns: Sequence[Sequence[Sequence[int]]],
    length: int,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b k t"]:
    """Averaging weights over prompt positions, per sample and concept.

    `columns[b][k]` lists the positions of concept k in prompt b; an empty list gives a zero row,
    hence a zero map (a concept that does not stand in this prompt).
    """
    select = torch.zeros(len(columns), max(map(len, columns), default=0), length, device=device)
    for b, of_prompt in enumerate(columns):
        for k, positions in enumerate(of_prompt):
            for position in positions:
                select[b, k, position] += 1 / len(positions)
    return select


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


@dataclass
class AttentionRecorder:
    """Collects head-averaged attention probabilities of chosen prompt columns, layer by layer.

    Attributes:
        select: [b, k, t] weights over the t prompt positions; see :func:`select_columns`.
        latent_size: (height, width) of the latent that the UNet gets.
        layers: names of the layers to record; None records all that report.
        grad: keep the graph, so that losses on the maps reach the concept vectors.
        maps: layer name -> [b, k, h, w], values in 0..1, filled during the forward pass.
    """

    select: Float[Tensor, "b k t"]
    latent_size: tuple[int, int]
    layers: frozenset[str] | None = None
    grad: bool = False
    maps: AttentionMaps = field(default_factory=dict)

    def wants(self, layer: str) -> bool:
        """Whether `layer` is to be recorded."""
        return self.layers is None or layer in self.layers

    def record(
        self,
        layer: str,
        q: Float[Tensor, "b q c"],
        k: Float[Tensor, "b t c"],
        heads: int,
    ) -> None:
        """Keep softmax(q k^T / sqrt(d_head)) of the selected columns, averaged over heads.

        The softmax runs in float32 whatever the weights' type.
        """
        if not self.wants(layer):
            return
        with torch.set_grad_enabled(self.grad and torch.is_grad_enabled()):
            self.maps[layer] = column_probabilities(q, k, self.select, heads, self.latent_size)


@contextmanager
def listening(
    recorder: AttentionRecorder, projections: Mapping[str, tuple[nn.Module, nn.Module, int]]
) -> Iterator[AttentionRecorder]:
    """Let `recorder` see the queries and keys of cross-attention layers while the context is open.

    `projections` gives each layer's modules of queries and of keys, and its number of heads. Their
    outputs are listened to, so attention kernels, processors and LoRAs stay as they are, and no
    projection is computed twice. All hooks are gone afterwards, also after an exception.
    """
    queries: dict[str, Tensor] = {}

    def on_query(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        queries[name] = output

    def on_key(name: str, heads: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        recorder.record(name, queries.pop(name), output, heads)

    handles = []
    try:
        for name, (to_q, to_k, heads) in projections.items():
            if recorder.wants(name):
                handles.append(to_q.register_forward_hook(partial(on_query, name)))
                handles.append(to_k.register_forward_hook(partial(on_key, name, heads)))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def column_probabilities(
    q: Float[Tensor, "b q c"],
    k: Float[Tensor, "b t c"],
    select: Float[Tensor, "_b k _t"],
    heads: int,
    latent_size: tuple[int, int],
) -> Float[Tensor, "b k h w"]:
    """Cross-attention probabilities of the selected columns, averaged over heads (VCD Eq. 2)."""
    q = rearrange(q, "b q (heads d) -> b heads q d", heads=heads)
    k = rearrange(k, "b t (heads d) -> b heads t d", heads=heads)
    logits = einsum(
        q.float() * q.shape[-1] ** -0.5, k.float(), "b heads q d, b heads t d -> b heads q t"
    )
    # A patch may append tokens of its own to the text's: they take part in the softmax alone.
    select = F.pad(select, (0, logits.shape[-1] - select.shape[-1]))
    weights = repeat_batch(select, q.shape[0]) / heads
    maps = einsum(logits.softmax(dim=-1), weights, "b heads q t, b k t -> b k q")
    height, width = map_size(q.shape[2], latent_size)
    return rearrange(maps, "b k (h w) -> b k h w", h=height, w=width)


def repeat_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat the first axis to `batch`: a host may run several chunks (cond, uncond) in one call."""
    return x if x.shape[0] == batch else x.repeat(batch // x.shape[0], *[1] * (x.ndim - 1))


def mean_maps(
    maps: Mapping[str, Float[Tensor, "b k _h _w"]], layers: Iterable[str], size: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Mean over `layers`, each map resized to `size` (bilinear) first.

    Raises:
        KeyError: a layer was not recorded.
    """
    resized = [resize_maps(maps[layer], size) for layer in layers]
    return torch.stack(resized).mean(dim=0)


def resize_maps(
    maps: Float[Tensor, "b k _h _w"], size: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Bilinear resize; area averaging where it shrinks."""
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] > size[0]:
        return F.interpolate(maps, size=size, mode="area")
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


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
