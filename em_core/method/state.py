"""The state of a run: a value that every step replaces as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from ..prompts import ConceptVectors

Curves = Mapping[str, tuple[tuple[int, float], ...]]
"""Name -> (step, value) of every point."""
Moments = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> AdamW's state of it."""


@dataclass(frozen=True)
class PictureState:
    """What the E-step knows of one picture with k concepts.

    Attributes:
        maps: [k, h, w] the attention maps that the latest estimate was made from.
        pending: [k, h, w] sum of the maps seen since then, `pending_count` [k] of them.
        masks: [k, H, W] masks that the M-step trains under, 0..1.
        labels: [k, H, W] the same as labels.
        found: [k] whether a concept has a mask worth learning under; on the CPU, since each step asks.
        regions: [h, w] the region of each cell, see :mod:`em_core.masks.regions`; None without them.
        named: [k, r] how much the model's error says that each region is what a concept's first vectors
            stand for, see :func:`em_core.method.presence.naming`; None where it was not asked.
        told: the same where the first maps were unclear, so that concepts are placed by it too; None where
            they were clear.
        doubtful: [k] whether the model saw a concept nowhere at the start, whatever its mask; on the CPU.
            None without first masks.
        first: [k, h, w] the maps of the first masks, which no learning has touched; None without them.
    """

    maps: Float[Tensor, "k h w"]
    pending: Float[Tensor, "k h w"]
    pending_count: Float[Tensor, " k"]
    masks: Float[Tensor, "k H W"]
    labels: Bool[Tensor, "k H W"]
    found: Bool[Tensor, " k"]
    regions: Int[Tensor, "_h _w"] | None = None
    named: Float[Tensor, "k r"] | None = None
    told: Float[Tensor, "k r"] | None = None
    doubtful: Bool[Tensor, " k"] | None = None
    first: Float[Tensor, "k h w"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", self.found.cpu())
        if self.doubtful is not None:
            object.__setattr__(self, "doubtful", self.doubtful.cpu())


@dataclass(frozen=True)
class RunState:
    """Everything that changes during a run.

    A step returns a new state and leaves the old one as it was. The joint and the visual phase alone
    learn large weights in place: there, `weights` and their moments are the model's own tensors, which
    the next step changes.

    Attributes:
        vectors: concept -> encoder -> token vectors [n, d].
        generator: state of the one source of randomness.
        pictures: one per example.
        weights: name -> parameters of the joint phase (LoRA factors or whole weights) or of the visual
            one (blocks of image attention).
        moments: of the vectors and weights; see :mod:`em_core.method.optimizer`.
        phase, step: "em", "joint" or "visual", and how many steps of it are done.
        curves: what was measured at each step.
    """

    vectors: ConceptVectors
    generator: UInt8[Tensor, " g"]
    pictures: tuple[PictureState, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)
    phase: str = "em"
    step: int = 0
    curves: Curves = field(default_factory=dict)

    def with_points(self, values: Mapping[str, float]) -> "RunState":
        """The state with one more point, at its step, on each of the named curves."""
        added = {n: (*self.curves.get(n, ()), (self.step, value)) for n, value in values.items()}
        return replace(self, curves={**self.curves, **added})


def generator_at(state: UInt8[Tensor, " g"]) -> torch.Generator:
    """A generator that goes on from a state."""
    generator = torch.Generator()
    generator.set_state(state.cpu())
    return generator
