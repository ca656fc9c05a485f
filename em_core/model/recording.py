"""Recording the attention that pixels pay to the concepts' text tokens (VCD Eq. 2, softmax part).

A host calls :meth:`AttentionRecorder.record` with the queries and keys of an attention layer as
they pass. Only the columns of the concepts are kept, averaged over heads; the attention's output
itself is computed elsewhere, by whatever kernel the host uses.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..masks.resizing import Size, resize
from .columns import column_probabilities, split_heads
from .layers import AttentionLayer, size_of_map

AttentionMaps = dict[str, Tensor]


@dataclass
class AttentionRecorder:
    """Collects head-averaged attention probabilities of chosen text columns, layer by layer.

    Attributes:
        select: stream -> [b, k, t] averaging weights over its t text positions; see
            :func:`em_core.model.columns.select_columns`.
        layers: name -> the layers to record.
        grad: keep the graph, so that losses on the maps reach the concept vectors: of every layer,
            of none, or of the layers with these names.
        among: name -> the self-attention layers to record, all of one size with n pixels.
        maps: layer name -> [b, k, h, w], values in 0..1, filled during the forward pass.
        affinity: layer name of `among` -> [n, n], how the pixels attend to one another, mean over
            heads and samples; each row sums to 1.
    """

    select: Mapping[str, Float[Tensor, "b k _t"]]
    layers: Mapping[str, AttentionLayer]
    grad: bool | Collection[str] = False
    among: Mapping[str, AttentionLayer] = field(default_factory=dict)
    maps: AttentionMaps = field(default_factory=dict)
    affinity: AttentionMaps = field(default_factory=dict)

    def wants(self, layer: str) -> bool:
        """Whether `layer` is to be recorded."""
        return layer in self.layers or layer in self.among

    def record(
        self,
        layer: str,
        q: Float[Tensor, "b q c"],
        k: Float[Tensor, "b t c"],
        heads: int,
        others: Float[Tensor, "b n c"] | None = None,
    ) -> None:
        """Keep the selected columns' attention probabilities, averaged over heads.

        The first pass counts. Gradient checkpointing repeats it in the backward pass, and maps of the
        repetition would keep all that it computes; those without a graph are not computed again.

        Args:
            layer: name of the layer.
            q: queries of the pixels.
            k: keys of the text; tokens that a patch has appended take part in the softmax alone.
            heads: number of heads that c is divided into.
            others: further keys under the same softmax: the image's own in joint attention. None
                for cross-attention, whose softmax is over the text alone.
        """
        if layer in self.among:
            self.record_affinity(layer, q, k, heads)
        if layer not in self.layers:
            return
        described = self.layers[layer]
        grad = self.grad if isinstance(self.grad, bool) else layer in self.grad
        if layer in self.maps and not grad:
            return
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            maps = column_probabilities(q, k, self.select[described.stream], heads, others)
            height, _ = size_of_map(q.shape[1], described.size)
            self.maps.setdefault(layer, rearrange(maps, "b k (h w) -> b k h w", h=height))

    @torch.no_grad()
    def record_affinity(
        self, layer: str, q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"], heads: int
    ) -> None:
        """Keep a self-attention layer's probabilities, one sample at a time to save memory.

        A layer that a patch has given other pixels than its own (merged or cut into tiles) is left
        out.
        """
        pixels = self.among[layer].pixels
        if q.shape[1] != pixels or k.shape[1] != pixels:
            return
        q, k = split_heads(q, heads).float(), split_heads(k, heads).float()
        total = torch.zeros(pixels, pixels, device=q.device)
        for one, other in zip(q * q.shape[-1] ** -0.5, k, strict=True):
            total += (one @ other.mT).softmax(dim=-1).mean(dim=0)
        self.affinity[layer] = total / len(q)


@contextmanager
def listening(
    recorder: AttentionRecorder, modules: Mapping[str, Any]
) -> Iterator[AttentionRecorder]:
    """Let `recorder` see the queries and keys of attention layers while the context is open.

    `modules` gives each layer's attention, with its projections `to_q` and `to_k` and its number of
    `heads`. The projections' outputs are listened to, so attention kernels, processors and LoRAs stay
    as they are, and no projection is computed twice. All hooks are gone afterwards, also after an
    exception.
    """
    queries: dict[str, Tensor] = {}

    def on_query(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        queries[name] = output

    def on_key(name: str, heads: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        recorder.record(name, queries.pop(name), output, heads)

    handles = []
    try:
        for name, module in modules.items():
            if recorder.wants(name):
                on_keys = partial(on_key, name, module.heads)
                handles.append(module.to_q.register_forward_hook(partial(on_query, name)))
                handles.append(module.to_k.register_forward_hook(on_keys))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def mean_maps(
    maps: Mapping[str, Float[Tensor, "b k _h _w"]], layers: Iterable[str], size: Size
) -> Float[Tensor, "b k h w"]:
    """Mean over `layers`, each map resized to `size` first.

    Raises:
        KeyError: a layer was not recorded.
    """
    resized = [resize(maps[layer], size, "map") for layer in layers]
    return torch.stack(resized).mean(dim=0)
