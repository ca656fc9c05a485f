"""A visual condition while pictures are drawn: the references' features, step by step, and their cache."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import require
from ..masks.resizing import Size
from ..masks.thresholds import otsu_of_tenths
from .columns import column_probabilities, select_columns
from .image_attention import Attend, attend, image_attention
from .visual import Blocks, Place, blocks_of, gates, keys_under, require_places

CACHE_BYTES = 2**30
Columns = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Reference:
    """A picture to look at.

    Attributes:
        latent: its latent, scaled as the model takes it.
        masks: concept -> where it is, at any size; None lets the token's attention say so (ViCo's mask
            by Otsu's threshold).
    """

    latent: Float[Tensor, "c h w"]
    masks: Mapping[str, Bool[Tensor, "_ _"] | None]


@dataclass(frozen=True, eq=False)
class VisualUse:
    """A visual condition as it is applied.

    Attributes:
        values: parameters of the blocks, see :func:`em_core.model.visual.init_blocks`.
        references: what is looked at; a concept in several of them looks at all.
        gated: whether a concept's blocks act on the pixels that attend to it, or on all.
        own_prompts: whether each half of guidance sees the references under its own prompt.
        strength: factor of what the blocks add; 0 is the model without them, bit for bit.
        start, end: the part of the sampling in which they act, in shares of the schedule.
    """

    values: Mapping[str, Tensor]
    references: tuple[Reference, ...]
    gated: bool = True
    own_prompts: bool = False
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        require("strength", self.strength, 0 <= self.strength <= 2, "0 to 2")
        fine = 0 <= self.start <= self.end <= 1
        require("range of the sampling", (self.start, self.end), fine, "0 <= start <= end <= 1")

    @property
    def concepts(self) -> tuple[str, ...]:
        """Those that have blocks and something to look at."""
        named = dict.fromkeys(path.partition("/")[0] for path in self.values)
        return tuple(n for n in named if any(n in of.masks for of in self.references))

    def acts_at(self, t: float, last: float) -> bool:
        """Whether the blocks act at a time t of 0 (clean) to `last` (noise)."""
        share = 1 - t / last
        low = self.start if self.start > 0 else -1.0
        high = self.end if self.end < 1 else 2.0
        return self.strength > 0 and low <= share <= high


@dataclass(frozen=True)
class Seen:
    """What one time and prompt see of the references.

    Attributes:
        features: place -> concept -> features [n, c] of the pixels that are looked at.
        keys: place -> the prompt's keys [1, t, c], which say where pixels attend to the concepts.
        columns: concept -> positions of its tokens in the prompt.
        length: tokens of the prompt.
    """

    features: Mapping[str, Mapping[str, Tensor]]
    keys: Mapping[str, Tensor]
    columns: Columns
    length: int

    def to(self, device: torch.device) -> "Seen":
        features = {
            place: {name: x.to(device) for name, x in of.items()}
            for place, of in self.features.items()
        }
        keys = {place: x.to(device) for place, x in self.keys.items()}
        return Seen(features, keys, self.columns, self.length)

    @property
    def bytes(self) -> int:
        held = [*self.keys.values(), *(x for of in self.features.values() for x in of.values())]
        return sum(x.numel() * x.element_size() for x in held)


@dataclass
class SeenCache:
    """What was seen, in the computer's own memory: the next picture with the same prompt and steps needs
    no pass of the references.

    Attributes:
        most: bytes that it may hold; what was unused the longest goes first.
        held: key -> what was seen.
    """

    most: int = CACHE_BYTES
    held: OrderedDict[Hashable, Seen] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, make: Callable[[], Seen], device: torch.device) -> Seen:
        """What was seen under this key, or what `make` gives, which is kept."""
        if key in self.held:
            self.held.move_to_end(key)
            return self.held[key].to(device)
        made = make()
        self.held[key] = made.to(torch.device("cpu"))
        while len(self.held) > 1 and sum(seen.bytes for seen in self.held.values()) > self.most:
            self.held.popitem(last=False)
        return made


class Viewer:
    """Lets a visual condition act in a UNet's passes; several may act in one.

    Attributes:
        use: the condition.
        places: those that have blocks.
        chunks: what each of the equal parts of the next pass's batch has seen; None sees nothing.
        acted: names of the places that have acted in this pass.
    """

    looker: ClassVar["Viewer | None"] = None  # whose references go through the UNet just now

    def __init__(
        self,
        use: VisualUse,
        modules: nn.Module,
        places_at: Callable[[Size], tuple[Place, ...]],
        attention: Attend = attend,
    ) -> None:
        self.use, self.modules, self.places_at, self.attention = use, modules, places_at, attention
        self.places = {place.name: place for place in places_at((64, 64))}
        require_places(use.values, list(self.places.values()))
        self.values: dict[str, Tensor] = {}
        self.blocks: Blocks = {}
        self.chunks: tuple[Seen | None, ...] = ()
        self.acted: set[str] = set()
        self.queries: dict[str, Tensor] = {}
        self.caught: dict[str, dict[str, Tensor]] = {}

    def release(self) -> None:
        """Let go of what lies on the device."""
        self.values, self.blocks, self.queries, self.chunks = {}, {}, {}, ()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the places while the context is open; the UNet is as it was afterwards."""
        handles = []
        try:
            for name, place in self.places.items():
                attention: Any = self.modules.get_submodule(name)
                block = self.modules.get_submodule(place.block)
                handles.append(attention.to_q.register_forward_hook(partial(self.on, name, "q")))
                handles.append(attention.to_k.register_forward_hook(partial(self.on, name, "k")))
                handles.append(block.register_forward_hook(partial(self.on_output, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def on(self, name: str, what: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        if Viewer.looker is self:
            self.caught.setdefault(name, {})[what] = output
        elif what == "q" and self.chunks and Viewer.looker is None:
            self.queries[name] = output

    def on_output(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if Viewer.looker is self:
            self.caught[name]["x"] = output
        return self.act(name, output) if self.chunks and Viewer.looker is None else output

    @torch.no_grad()
    def look(self, run: Callable[[Tensor], Any], columns: Columns, length: int) -> Seen:
        """Let the references that show the prompt's concepts go through the UNet.

        Args:
            run: a pass of a latent [1, c, h, w] at the present time and under the prompt.
            columns: concept -> positions of its tokens in the prompt.
            length: tokens of the prompt.
        """
        columns = {name: columns[name] for name in self.use.concepts if columns.get(name)}
        features: dict[str, dict[str, list[Tensor]]] = {}
        keys: dict[str, Tensor] = {}
        for reference in self.use.references:
            names = [name for name in columns if name in reference.masks]
            if not names:
                continue
            Viewer.looker, self.caught = self, {}
            try:
                run(reference.latent[None])
            finally:
                Viewer.looker, caught, self.caught = None, self.caught, {}
            size = (reference.latent.shape[-2], reference.latent.shape[-1])
            for place in self.places_at(size):
                of_place, keys[place.name] = caught[place.name], caught[place.name]["k"]
                for name in names:
                    mask = reference.masks[name]
                    seen = self.keys(place, of_place, mask, columns[name], length)
                    features.setdefault(place.name, {}).setdefault(name, []).append(
                        of_place["x"][0][seen]
                    )
        joined = {p: {n: torch.cat(x) for n, x in of.items()} for p, of in features.items()}
        return Seen(joined, keys, columns, length)

    def keys(
        self,
        place: Place,
        caught: Mapping[str, Tensor],
        mask: Tensor | None,
        positions: Sequence[int],
        length: int,
    ) -> Bool[Tensor, " n"]:
        """Which of a reference's pixels a concept looks at."""
        x = caught["x"]
        if mask is not None:
            return keys_under(mask.float(), place.size).to(x.device)
        select = select_columns([[positions]], length, x.device)
        maps = column_probabilities(caught["q"], caught["k"], select, place.heads)
        return otsu_of_tenths(rearrange(maps[0, 0], "(h w) -> h w", h=place.size[0])).flatten()

    def act(self, name: str, x: Float[Tensor, "B n c"]) -> Float[Tensor, "B n c"]:
        """The features with what the blocks add, part by part of the batch."""
        self.acted.add(name)
        self.move_blocks(x)
        q, rows, done, out = self.queries.pop(name), len(x) // len(self.chunks), 0, []
        for _, same in groupby(self.chunks, id):
            chunks = list(same)
            part = slice(done, done + rows * len(chunks))
            done = part.stop
            seen = chunks[0]
            changed = x[part] if seen is None else self.changed(name, x[part], q[part], seen)
            out.append(changed)
        return out[0] if len(out) == 1 else torch.cat(out)

    def move_blocks(self, x: Tensor) -> None:
        """Bring the blocks to where the features are, in their type."""
        there = next(iter(self.values.values()), None)
        if there is None or (there.device, there.dtype) != (x.device, x.dtype):
            self.values = {name: value.to(x) for name, value in self.use.values.items()}
            self.blocks = blocks_of(self.values, list(self.places.values()))

    def changed(self, name: str, x: Tensor, q: Tensor, seen: Seen) -> Tensor:
        """Some samples' features with what the blocks of all concepts in the prompt add."""
        heads, names = self.places[name].heads, list(seen.features.get(name, {}))
        if not names:
            return x
        weights = torch.full((len(x), len(names), 1, 1), self.use.strength, device=x.device)
        if self.use.gated:
            select = select_columns([[seen.columns[n] for n in names]], seen.length, x.device)
            k = seen.keys[name].to(q).expand(len(q), -1, -1)
            weights = weights * gates(column_probabilities(q, k, select, heads))
        total = x
        for i, concept in enumerate(names):
            reference = seen.features[name][concept][None]
            p = self.blocks[concept][name]
            change = image_attention(x, reference, p, heads, attention=self.attention)
            total = total + (weights[:, i] * change).to(x)
        return total
