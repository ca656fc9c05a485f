"""AdamW over named parameters, with its moments as values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import TrainingError
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


def clip_and_step(
    optimizer: torch.optim.AdamW, loss: Tensor, gradient_clip: float, state: RunState
) -> None:
    """Clip the gradients and step.

    Raises:
        TrainingError: the loss or a gradient is not finite; nothing has changed.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            f"The loss is not finite at step {state.step + 1} of the {state.phase} phase. "
            "Use a smaller learning rate or a wider number type. What was learned before is kept."
        )
    optimizer.step()
