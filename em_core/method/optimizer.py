"""AdamW over named parameters, with its moments as values."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..model.protocol import loss_scale
from ..prompts import ConceptVectors
from .state import Moments, RunState

LearnableVectors = dict[str, dict[str, Tensor]]


def learnable(vectors: ConceptVectors) -> LearnableVectors:
    """Copies of the concepts' vectors that gather gradients."""
    return {
        concept: {name: v.detach().clone().requires_grad_() for name, v in by_encoder.items()}
        for concept, by_encoder in vectors.items()
    }


def learned(vectors: ConceptVectors) -> LearnableVectors:
    """Copies of the concepts' vectors without gradients."""
    return {
        concept: {name: v.detach().clone() for name, v in by_encoder.items()}
        for concept, by_encoder in vectors.items()
    }


def named_vectors(vectors: ConceptVectors) -> dict[str, Tensor]:
    """`vectors/<concept>/<encoder>` -> vectors."""
    return {
        f"vectors/{concept}/{encoder}": v
        for concept, by_encoder in vectors.items()
        for encoder, v in by_encoder.items()
    }


def give_moments(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor], moments: Moments
) -> None:
    """Let the optimizer go on from copies of the moments of these parameters."""
    for name, p in parameters.items():
        if name in moments:
            optimizer.state[p] = {
                key: x.cpu().clone() if key == "step" else x.to(p.device).clone()
                for key, x in moments[name].items()
            }


def moments_of(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The moments of those parameters that have been stepped."""
    return {n: dict(optimizer.state[p]) for n, p in parameters.items() if p in optimizer.state}


def rate_factor(step: int, decay_after: int | None) -> float:
    """Share of the full learning rate after `step` steps: 1, then the inverse square of the step."""
    return 1.0 if decay_after is None else min(1.0, decay_after / (step + 1)) ** 2


class GradientOverflow(TrainingError):
    """The loss is finite, but its gradient is not."""


def add_gradient(loss: Tensor, host: Any) -> None:
    """Add the loss's gradient, times the host's scale, to the parameters'."""
    scale = loss_scale(host)
    (loss if scale == 1 else loss * scale).backward()


def clip_and_step(
    optimizer: torch.optim.AdamW,
    terms: Mapping[str, Tensor],
    gradient_clip: float,
    state: RunState,
    scale: float = 1.0,
) -> dict[str, float]:
    """Clip the gradients, which were added times `scale`, and step; the values of the loss's terms.

    All is read from the device at once, the only time in a step that it is waited for.

    Raises:
        TrainingError: a term or a gradient is not finite; nothing has changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters if scale != 1 else ():
        if p.grad is not None:
            p.grad /= scale
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    *values, total_norm = torch.stack([*(x.detach() for x in terms.values()), norm]).tolist()
    if not all(map(math.isfinite, [*values, total_norm])):
        kind = GradientOverflow if all(map(math.isfinite, values)) else TrainingError
        raise kind(
            f"The loss is not finite at step {state.step + 1} of the {state.phase} phase. "
            "Use a smaller learning rate or a wider number type. What was learned before is kept."
        )
    optimizer.step()
    return dict(zip(terms, values, strict=True))


Result = TypeVar("Result")


def with_fitting_scale(host: Any, step: Callable[[], Result]) -> Result:
    """Take a step, again with a smaller scale as long as the host's makes the gradient overflow.

    Raises:
        TrainingError: see :func:`clip_and_step`.
    """
    while True:
        try:
            return step()
        except GradientOverflow:
            if loss_scale(host) <= 1:
                raise
            host.loss_scale = max(1.0, host.loss_scale / 4)
