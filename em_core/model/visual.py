"""Where image attention stands in a UNet, and how it acts in a pass beside its references (ViCo).

ViCo (arXiv 2306.00971) puts its blocks behind every second text transformer of the way up, from the
second on: four of them in Stable Diffusion 1.x. What they look at are the features of a clean reference
at the same place, which come from the same UNet at the same time and with the same prompt, but never
through the blocks themselves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import UserError
from ..masks.resizing import Size, cut, resize
from ..masks.thresholds import otsu_of_tenths
from .adapters import TrainableParts
from .image_attention import Parameters, image_attention, init_block, shapes
from .layers import AttentionLayer
from .recording import AttentionMaps

Act = Callable[[str, Tensor], Tensor]
"""Name of a place, features [b, n, c] after its text block -> features that go on."""
Blocks = Mapping[str, Mapping[str, Parameters]]
"""Concept -> name of a place -> parameters of its block."""


@dataclass(frozen=True)
class Place:
    """A place of image attention: behind the last text block of a transformer.

    Attributes:
        name: that of the text attention in this block; see `AttentionLayer`.
        size: height and width of its features.
        channels: c of the features.
        heads: number of heads.
    """

    name: str
    size: Size
    channels: int
    heads: int

    @property
    def block(self) -> str:
        """Path of the text block, whose output image attention reads and changes."""
        return self.name.rpartition(".")[0]


def image_places(layers: Sequence[AttentionLayer], modules: nn.Module) -> tuple[Place, ...]:
    """ViCo's places in a UNet with these layers that read text.

    Args:
        layers: in the model's order; the innermost does not localise.
        modules: the module that the layers' names are paths in.
    """

    def transformer(layer: AttentionLayer) -> str:
        return layer.name.rpartition(".transformer_blocks.")[0]

    groups = [list(group) for _, group in groupby(layers, transformer)]
    inner = max((i for i, g in enumerate(groups) if not g[0].localises), default=-1)
    chosen = [group[-1] for group in groups[inner + 1 :]][1::2]
    found = []
    for layer in chosen:
        attention: Any = modules.get_submodule(layer.name)
        found.append(Place(layer.name, layer.size, attention.to_q.weight.shape[1], attention.heads))
    return tuple(found)


@contextmanager
def transformed(modules: nn.Module, places: Sequence[Place], act: Act) -> Iterator[None]:
    """Let `act` change what the text blocks at these places give while the context is open."""

    def on_output(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return act(name, output)

    handles = []
    try:
        for place in places:
            block = modules.get_submodule(place.block)
            handles.append(block.register_forward_hook(partial(on_output, place.name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def init_blocks(
    places: Sequence[Place], concepts: Sequence[str], generator: torch.Generator, zero: bool
) -> dict[str, Tensor]:
    """`<concept>/<number of the place>/<name>` -> values of new blocks, the same on every host."""
    return {
        f"{concept}/{number}/{name}": value
        for concept in concepts
        for number, place in enumerate(places)
        for name, value in init_block(place.channels, generator, zero).items()
    }


def blocks_of(values: Mapping[str, Tensor], places: Sequence[Place]) -> Blocks:
    """The blocks by concept and place, from values under the names of :func:`init_blocks`."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for path, value in values.items():
        concept, number, name = path.split("/")
        found.setdefault(concept, {}).setdefault(places[int(number)].name, {})[name] = value
    return found


def require_places(values: Mapping[str, Tensor], places: Sequence[Place]) -> None:
    """Refuse blocks that were learned on another family.

    Raises:
        UserError: the blocks do not stand at these places.
    """
    expected = {
        f"{number}/{name}": shape
        for number, place in enumerate(places)
        for name, shape in shapes(place.channels).items()
    }
    for concept in dict.fromkeys(path.partition("/")[0] for path in values):
        start = f"{concept}/"
        found = {
            p.removeprefix(start): tuple(v.shape) for p, v in values.items() if p.startswith(start)
        }
        if found != expected:
            widths = [
                shape[0] for path, shape in sorted(found.items()) if path.endswith("norm1.bias")
            ]
            raise UserError(
                f"The visual condition of {concept} does not fit this model. Expected image attention of widths "
                f"{[place.channels for place in places]}, got {widths}. Load the model that it was learned on."
            )


@contextmanager
def trainable_blocks(
    values: Mapping[str, Tensor], device: torch.device
) -> Iterator[TrainableParts]:
    """Image attention that can be learned while the context is open; it acts where a pass is told so."""
    parameters = {n: nn.Parameter(x.detach().to(device).float().clone()) for n, x in values.items()}
    yield TrainableParts(
        parameters,
        lambda: {name: p.detach().clone() for name, p in parameters.items()},
        untouched=nullcontext,
    )


def keys_under(mask: Float[Tensor, "H W"], size: Size) -> Bool[Tensor, " n"]:
    """Which pixels of a layer lie under a mask in 0..1: more than half, or where it is most."""
    small = resize(mask, size, "mask")
    found = cut(small)
    return rearrange(found if bool(found.any()) else small >= small.max(), "h w -> (h w)")


def gates(maps: Float[Tensor, "b k n"]) -> Float[Tensor, "b k n 1"]:
    """How much each concept's blocks act on each pixel, 0..1: as much as the pixel attends to it.

    C = A / max(A), times the concept's share of all the concepts' C there, so that they sum to 1 at most.
    """
    C = maps.detach() / maps.detach().amax(dim=-1, keepdim=True).clamp(min=1e-8)
    return (C * C / C.sum(dim=1, keepdim=True).clamp(min=1e-8))[..., None]


@dataclass
class VisualPass:
    """One pass of noisy latents, each of which looks at references.

    The references' own passes are the first samples of the same batch, or came before (`features`). They
    stand one reference after another, each once for every noisy sample, with its time and prompt.

    Attributes:
        names: the picture's concepts, in the order of the maps' columns.
        places: name -> place.
        blocks: of the concepts that have image attention.
        samples: b, the number of noisy latents, the last of the batch.
        source: concept -> number of its reference.
        present: concept -> which samples' prompts have it, 1 or 0; absent where none has.
        maps: the recorder's, of this pass.
        seen: concept -> place -> which pixels of its reference it looks at; without them, those of ViCo's
            mask, from the reference's maps.
        gated: whether a concept's blocks act where pixels attend to it, or everywhere (ViCo).
        features: place -> features of the references, where they came before.
        reference_maps: of the pass in which these came.
    """

    names: Sequence[str]
    places: Mapping[str, Place]
    blocks: Blocks
    samples: int
    source: Mapping[str, int]
    present: Mapping[str, Float[Tensor, " b"]]
    maps: AttentionMaps
    seen: Mapping[str, Mapping[str, Bool[Tensor, " n"]]]
    gated: bool
    features: Mapping[str, Tensor] = field(default_factory=dict)
    reference_maps: AttentionMaps = field(default_factory=dict)

    def act(self, place: str, x: Float[Tensor, "B n c"]) -> Float[Tensor, "B n c"]:
        """Features after the place's blocks; the references' own go on as they are."""
        first = len(x) - self.samples
        features = self.features[place] if self.features else x[:first]
        noisy = x[first:]
        own = self.maps.get(place)
        gate = None
        if self.gated and own is not None:
            acting = [i for i, name in enumerate(self.names) if name in self.present]
            gate = dict(zip(acting, gates(own[first:, acting].flatten(-2)).unbind(1), strict=True))
        total = noisy
        for i, name in enumerate(self.names):
            if name not in self.present:
                continue
            rows = slice(self.source[name] * self.samples, (self.source[name] + 1) * self.samples)
            heads = self.places[place].heads
            seen = self.keys(place, i, name, rows)
            change = image_attention(noisy, features[rows], self.blocks[name][place], heads, seen)
            weight = self.present[name][:, None, None]
            weight = weight if gate is None else weight * gate[i]
            total = total + (weight * change).to(noisy)
        return torch.cat([x[:first], total]) if first else total

    def keys(self, place: str, column: int, name: str, rows: slice) -> Bool[Tensor, "b n"]:
        """Which pixels of its reference a concept looks at, for each sample."""
        if name in self.seen:
            return self.seen[name][place][None].expand(self.samples, -1)
        maps = self.reference_maps or self.maps
        return otsu_of_tenths(maps[place][rows, column].detach()).flatten(1)
