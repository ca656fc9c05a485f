"""Recording and aggregating the cross-attention of concept columns (VCD Eq. 2, softmax part).

A host calls :meth:`AttentionRecorder.record` with the queries and keys of a cross-attention layer
as they pass. Only the columns of the concepts are kept, averaged over heads; the attention output
itself is computed elsewhere, by whatever kernel the host uses.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..masks.resizing import resize_maps
from .columns import column_probabilities

AttentionMaps = dict[str, Tensor]


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


def mean_maps(
    maps: Mapping[str, Float[Tensor, "b k _h _w"]], layers: Iterable[str], size: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """Mean over `layers`, each map resized to `size` (bilinear) first.

    Raises:
        KeyError: a layer was not recorded.
    """
    resized = [resize_maps(maps[layer], size) for layer in layers]
    return torch.stack(resized).mean(dim=0)
