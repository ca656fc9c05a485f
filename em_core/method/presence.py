"""Which of a prompt's concepts a picture does not show.

A word's attention, scaled to its own maximum, finds something in every picture. The model's own error tells
more: it predicts the noise better under words for what is there (the idea of diffusion classifiers,
arXiv 2303.16203; put to single words here). It tells a missing thing from the others, but costs a pass for each
name and each noise, so that it is asked only where masks say that something is missing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..model.protocol import Conditioning, DiffusionModel, passes_at_once, to_host
from ..prompts import ConceptVectors
from .maps import like_noise, one_time
from .problem import Prepared

TIMES = (0.2, 0.7)
"""Shares of the schedule in which a word makes a difference: later ones show all, earlier ones nothing."""
STANDARD_ERRORS = 2.0
"""By how many a concept must be less present than one that was not found, to be left out instead."""


@torch.no_grad()
def presence(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    generic_word: str,
    passes: int,
    generator: torch.Generator,
    batch: int = 10,
) -> Float[Tensor, "n k"]:
    """How much less the model errs with a concept's vectors than with a generic word's in their place.

    Args:
        prepared: a picture whose prompt names k concepts.
        vectors: of all its concepts.
        generic_word: a word that fits any thing.
        passes: n, noisy versions of the picture, the same for all concepts.
        generator: source of the times and the noise.

    Returns:
        For each of the n noises, on the CPU, the mean squared error of the schedule's target under the
        generic word minus that under the concept's own; the smallest mean is that of the concept that is
        most likely absent.
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
    errors = [mean_errors(host, prepared.Z0, t, eps, c, together) for c in conditionings]
    return (torch.stack(errors[1:], dim=1) - errors[0][:, None]).cpu()


def mean_errors(
    host: DiffusionModel,
    Z0: Float[Tensor, "1 c h w"],
    t: Float[Tensor, " b"],
    eps: Float[Tensor, "b c h w"],
    conditioning: Conditioning,
    together: int,
) -> Float[Tensor, " b"]:
    """Mean squared errors of the model's outputs under one prompt, `together` samples at a time."""
    errors = []
    for times, noise in zip(t.split(together), eps.split(together), strict=True):
        Z = Z0.expand_as(noise)
        Z_t = host.schedule.add_noise(Z, noise, times)
        output = host.predict(Z_t, times, conditioning.rows([0] * len(times)))
        wrong = output.float() - host.schedule.target(Z, noise, times)
        errors.append(wrong.square().mean(dim=(1, 2, 3)))
    return torch.cat(errors)


def who_is_there(present: Float[Tensor, "n k"], missing: Sequence[int]) -> list[int] | None:
    """The concepts without as many of the least present ones as are missing, as indices in order.

    None where that would leave out none but the missing, or where the noises do not agree on it: those
    that are left out instead must be less present by two standard errors.

    Args:
        present: what :func:`presence` gives.
        missing: the concepts whose masks are not believed, as indices.
    """
    order = torch.sort(present.mean(dim=0), descending=True, stable=True).indices.tolist()
    split = len(order) - len(missing)
    there, absent = sorted(order[:split]), order[split:]
    wronged = [index for index in absent if index not in missing]
    cleared = [index for index in missing if index in there]
    if not wronged:
        return None
    margin = present[:, cleared].mean(dim=1) - present[:, wronged].mean(dim=1)
    error = margin.std() / len(margin) ** 0.5
    return there if float(margin.mean()) > STANDARD_ERRORS * float(error) else None
