"""Which of a prompt's concepts a picture does not show.

A word's attention, scaled to its own maximum, finds something in every picture. The model's own error tells
more: it predicts the noise better under words for what is there (the idea of diffusion classifiers,
arXiv 2303.16203; put to single words here). It tells a missing thing from the others, but costs a pass for each
name and each noise, so that it is asked only where masks say that something is missing.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.protocol import Conditioning, DiffusionModel, passes_at_once, to_host
from ..prompts import ConceptVectors
from .maps import like_noise, one_time
from .problem import Prepared

TIMES = (0.2, 0.7)
"""Shares of the schedule in which a word makes a difference: later ones show all, earlier ones nothing."""


@torch.no_grad()
def presence(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    generic_word: str,
    passes: int,
    generator: torch.Generator,
    batch: int = 10,
) -> Float[Tensor, " k"]:
    """How much less the model errs with a concept's vectors than with a generic word's in their place.

    Args:
        prepared: a picture whose prompt names k concepts.
        vectors: of all its concepts.
        generic_word: a word that fits any thing.
        passes: noisy versions of the picture, the same for all concepts.
        generator: source of the times and the noise.

    Returns:
        Mean squared errors of the schedule's target, the generic word's minus the concept's own; the
        smallest is that of the concept that is most likely absent.
    """
    prompt, conditionings = prepared.example.prompt, []
    for name in (None, *prepared.names):
        instead = dict(vectors)
        if name is not None:
            count = len(next(iter(vectors[name].values())))
            instead[name] = host.initial_vectors(generic_word, count, generator)
        conditionings.append(host.encode_prompts([prompt], instead))
    t = to_host(host.schedule.draw_times(passes, generator, *TIMES), host)
    eps = like_noise(prepared.Z0, passes, generator)
    together = 1 if one_time(host) else passes_at_once(host, batch)
    errors = [mean_error(host, prepared.Z0, t, eps, c, together) for c in conditionings]
    return torch.stack(errors[1:]) - errors[0]


def mean_error(
    host: DiffusionModel,
    Z0: Float[Tensor, "1 c h w"],
    t: Float[Tensor, " b"],
    eps: Float[Tensor, "b c h w"],
    conditioning: Conditioning,
    together: int,
) -> Float[Tensor, ""]:
    """Mean squared error of the model's output under one prompt, `together` samples at a time."""
    total = torch.zeros((), device=Z0.device)
    for times, noise in zip(t.split(together), eps.split(together), strict=True):
        Z = Z0.expand_as(noise)
        Z_t = host.schedule.add_noise(Z, noise, times)
        output = host.predict(Z_t, times, conditioning.rows([0] * len(times)))
        total += (output.float() - host.schedule.target(Z, noise, times)).square().sum()
    return total / eps.numel()


def without_least(present: Float[Tensor, " k"], count: int) -> list[int]:
    """The concepts without the `count` least present ones, as indices in order.

    Of equals the last are left out.
    """
    order = torch.sort(present.cpu(), descending=True, stable=True).indices.tolist()
    return sorted(order[: len(order) - count])
