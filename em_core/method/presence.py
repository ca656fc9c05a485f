"""Which of a prompt's concepts a picture does not show, and in which region each of them is.

A word's attention, scaled to its own maximum, finds something in every picture. The model's own error tells
more: it predicts the noise better under words for what is there (the idea of diffusion classifiers,
arXiv 2303.16203; put to single words here). Where it is lower tells what a word stands for; how much lower
in all, a missing thing from the others. It costs a pass for each name and each noise.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..masks.regions import evidence
from ..masks.settings import MaskSettings
from ..model.protocol import Conditioning, DiffusionModel, passes_at_once, to_host
from ..prompts import ConceptVectors
from .maps import like_noise, one_time
from .problem import Prepared

TIMES = (0.2, 0.7)
"""Shares of the schedule in which a word makes a difference: later ones show all, earlier ones nothing."""
STANDARD_ERRORS = 2.0
"""By how many a concept must be less present than one that was not found, to be left out instead; and
above nothing the best region of a concept, to count in full."""


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
    missed = missed_words(host, prepared, vectors, generic_word, passes, TIMES, generator, batch)
    return missed.mean(dim=(2, 3)).T.cpu()


def missed_regions(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    generic_word: str,
    settings: MaskSettings,
    members: Float[Tensor, "r h w"],
    alike: Sequence[Sequence[int]],
    generator: torch.Generator,
) -> Float[Tensor, "k n r"]:
    """By how much the model's error grows in each region if a generic word takes a concept's place.

    Args:
        settings: of which the number of noises n, `naming_passes`, and their times count.
        members: the picture's regions, 1 where a cell belongs to one.
        alike: concepts whose vectors are the same, as indices; a generic word takes the place of all of
            them at once, since any of them stands for the others.

    Returns:
        For each noise, the mean of what :func:`missed_words` gives in the region; 0 for vectors that are the
        generic word's.
    """
    missed = missed_words(
        host,
        prepared,
        vectors,
        generic_word,
        settings.naming_passes,
        settings.naming_times,
        generator,
        alike=alike,
    )
    return torch.stack([evidence(of_concept, members) for of_concept in missed])


def naming(missed: Float[Tensor, "k n r"]) -> Float[Tensor, "k r"]:
    """How much the model's error says that a region is what a concept's vectors stand for.

    Args:
        missed: what :func:`missed_regions` gives.

    Returns:
        -1 to 1; 1 in a concept's best region if the noises agree on it by two standard errors, and less
        if they do not; 0 everywhere for vectors that are the generic word's.
    """
    mean, error = missed.mean(dim=1), missed.std(dim=1) / missed.shape[1] ** 0.5
    best, where = mean.max(dim=1, keepdim=True)
    sure = STANDARD_ERRORS * error.gather(1, where)
    return (mean / torch.maximum(best, sure).clamp(min=1e-12)).clamp(-1, 1)


def unseen(missed: Float[Tensor, "k n r"], large: Bool[Tensor, " r"]) -> Bool[Tensor, " k"]:
    """Which concepts the model sees no more of, in any region, than of any thing.

    Args:
        missed: what :func:`missed_regions` gives.
        large: the regions that are no mere specks.

    Returns:
        On the CPU, True where the mean over the noises is in no region above 0; False for vectors that
        are the generic word's, which say nothing.
    """
    seen = (missed[:, :, large].mean(dim=1) > 0).any(dim=1)
    return (~seen & missed.flatten(1).any(dim=1)).cpu()


@torch.no_grad()
def missed_words(
    host: DiffusionModel,
    prepared: Prepared,
    vectors: ConceptVectors,
    generic_word: str,
    passes: int,
    times: tuple[float, float],
    generator: torch.Generator,
    batch: int = 10,
    alike: Sequence[Sequence[int]] = (),
) -> Float[Tensor, "k n h w"]:
    """By how much the squared error of the model's output grows, at each pixel of the latents, if a
    generic word stands in a concept's place: for each concept, under n noises that all share. Concepts
    that are `alike` are replaced together, and have the same values."""
    groups = {index: tuple(group) for group in alike for index in group}
    replaced = [groups.get(index, (index,)) for index in range(len(prepared.names))]
    conditionings = {}
    for group in ((), *dict.fromkeys(replaced)):
        instead = dict(vectors)
        for name in (prepared.names[index] for index in group):
            count = len(next(iter(vectors[name].values())))
            instead[name] = host.initial_vectors(generic_word, count, generator)
        conditionings[group] = host.encode_prompts(prepared.example.prompt.orders(), instead)
    t = to_host(host.schedule.draw_times(passes, generator, *times), host)
    eps = like_noise(prepared.Z0, passes, generator)
    together = 1 if one_time(host) else passes_at_once(host, batch)
    errors = {
        group: squared_errors(host, prepared.Z0, t, eps, conditioning, together)
        for group, conditioning in conditionings.items()
    }
    return torch.stack([errors[group] for group in replaced]) - errors[()]


def squared_errors(
    host: DiffusionModel,
    Z0: Float[Tensor, "1 c h w"],
    t: Float[Tensor, " n"],
    eps: Float[Tensor, "n c h w"],
    conditioning: Conditioning,
    together: int,
) -> Float[Tensor, "n h w"]:
    """Squared errors of the model's outputs, mean over channels, under prompts that take turns."""
    count, errors = len(next(iter(conditioning.streams.values())).columns), []
    parts = (x.split(together) for x in (torch.arange(len(t)) % count, t, eps))
    for order, times, noise in zip(*parts, strict=True):
        Z = Z0.expand_as(noise)
        Z_t = host.schedule.add_noise(Z, noise, times)
        output = host.predict(Z_t, times, conditioning.rows(order.tolist()))
        wrong = output.float() - host.schedule.target(Z, noise, times)
        errors.append(wrong.square().mean(dim=1))
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
