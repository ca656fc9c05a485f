"""The M-step: one optimisation step under the present masks (VCD Eq. 3 + lambda Eq. 4)."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..masks.measures import union
from ..masks.resizing import resize
from ..model.layers import loss_layers, mask_layers
from ..model.protocol import Conditioning, loss_scale, to_host
from ..model.recording import AttentionMaps, mean_maps
from ..prompts import ConceptPrompt
from ..settings import EMSettings
from . import losses
from .maps import like_noise, one_time, recorder_for
from .optimizer import (
    add_gradient,
    clip_and_step,
    give_moments,
    learnable,
    learned,
    moments_of,
    named_vectors,
    rate_factor,
)
from .problem import Prepared, Problem
from .seg_mix import Mix
from .state import PictureState, RunState, generator_at

Mixes = Sequence[Sequence[Mix]]
"""Of each picture, its mixes."""
Terms = dict[str, Tensor]
Untouched = Callable[[], AbstractContextManager[None]]
"""Gives a context in which the model acts as if nothing had been learned."""


@dataclass(frozen=True)
class Draw:
    """The random part of an M-step: b noisy latents of one picture, each with a subset of its concepts.

    Attributes:
        index: which picture.
        subsets: the concepts' names in the order in which each prompt has them.
        prompts: the prompts.
        present: [b, k] 1 where the picture's k-th concept stands in the sample's prompt.
        flipped: the picture is mirrored.
        masks: of the picture's concepts in each sample, 0..1.
    """

    index: int
    subsets: tuple[tuple[str, ...], ...]
    prompts: tuple[ConceptPrompt, ...]
    present: Float[Tensor, "b k"]
    flipped: bool
    t: Float[Tensor, " b"]
    eps: Float[Tensor, "b c h w"]
    Z0: Float[Tensor, "b c h w"]
    masks: Float[Tensor, "b k H W"]


@dataclass(frozen=True)
class Samples:
    """Latents, concepts and masks of a batch of one picture, see :class:`Draw`."""

    subsets: tuple[tuple[str, ...], ...]
    prompts: tuple[ConceptPrompt, ...]
    flipped: bool
    Z0: Float[Tensor, "b c h w"]
    masks: Float[Tensor, "b k H W"]


def draw(
    problem: Problem, state: RunState, generator: torch.Generator, mixes: Mixes | None = None
) -> Draw:
    """Pick a picture, subsets of the concepts that were found in it, times and noise.

    With `mixes`, the samples are some of its mixes as often as the settings of the joint phase say.
    """
    settings, host = problem.settings, problem.host
    found_in = names_found(problem, state)
    usable = [i for i, found in enumerate(found_in) if found]
    index = usable[int(torch.randint(len(usable), (), generator=generator))]
    prepared, found = problem.pictures[index], found_in[index]
    mixed = bool(mixes) and bool(torch.rand((), generator=generator) < problem.joint.seg_mix)
    samples = (
        mixed_samples(prepared, settings, mixes[index], generator)
        if mixes and mixed
        else own_samples(prepared, settings, found, state.pictures[index], generator)
    )
    times = 1 if one_time(host) else settings.batch
    t = to_host(host.schedule.draw_times(times, generator).expand(settings.batch), host)
    present = torch.tensor(
        [[float(n in s and n in found) for n in prepared.names] for s in samples.subsets]
    )
    eps = like_noise(samples.Z0, settings.batch, generator)
    return Draw(
        index=index,
        subsets=samples.subsets,
        prompts=samples.prompts,
        present=to_host(present, host),
        flipped=samples.flipped,
        t=t,
        eps=eps,
        Z0=samples.Z0.expand_as(eps),
        masks=samples.masks.expand(settings.batch, -1, -1, -1),
    )


def own_samples(
    prepared: Prepared,
    settings: EMSettings,
    found: Sequence[str],
    state: PictureState,
    generator: torch.Generator,
) -> Samples:
    """The picture itself; without union sampling its prompt stands as the user wrote it."""
    prompt = prepared.example.prompt
    names = found if settings.draws_subsets else prepared.names
    subsets = tuple(draw_subset(names, settings, generator) for _ in range(settings.batch))
    prompts = tuple(prompt.subset(s) if settings.draws_subsets else prompt for s in subsets)
    flipped = settings.flip and bool(torch.rand((), generator=generator) < 0.5)
    Z0 = prepared.Z0_flipped if flipped and prepared.Z0_flipped is not None else prepared.Z0
    masks = state.masks.flip(-1) if flipped else state.masks
    return Samples(subsets, prompts, flipped, Z0, masks[None])


def mixed_samples(
    prepared: Prepared, settings: EMSettings, mixes: Sequence[Mix], generator: torch.Generator
) -> Samples:
    """Some of the picture's mixes, one for each sample."""
    picks = torch.randint(len(mixes), (settings.batch,), generator=generator).tolist()
    chosen = [mixes[pick] for pick in picks]
    subsets = tuple(mix.names for mix in chosen)
    prompts = tuple(prepared.example.prompt.subset(names) for names in subsets)
    Z0 = torch.cat([mix.Z0 for mix in chosen])
    return Samples(subsets, prompts, False, Z0, torch.stack([mix.masks for mix in chosen]))


def names_found(problem: Problem, state: RunState) -> list[list[str]]:
    """Of each picture, the concepts that were found in it."""
    return [
        [name for name, found in zip(prepared.names, picture.found.tolist(), strict=True) if found]
        for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
    ]


def draw_subset(
    names: Sequence[str], settings: EMSettings, generator: torch.Generator
) -> tuple[str, ...]:
    """All concepts in the prompt's order, or a random ordered subset (Break-a-Scene's union sampling)."""
    if not settings.draws_subsets:
        return tuple(names)
    order = torch.randperm(len(names), generator=generator).tolist()
    count = int(torch.randint(1, len(names) + 1, (), generator=generator))
    return tuple(names[i] for i in order[:count])


def condition(problem: Problem, state: RunState, drawn: Draw) -> Conditioning:
    """Encode the drawn prompts."""
    return problem.host.encode_prompts(drawn.prompts, state.vectors)


def recorded_layers(problem: Problem, prepared: Prepared, phase: str) -> tuple[str, ...]:
    """Layers whose maps a step needs: the loss's, and where the masks are re-estimated theirs too."""
    settings = problem.settings
    if settings.mode == "none":
        return ()
    wanted: tuple[str, ...] = ()
    if settings.has_attention_terms:
        wanted += loss_layers(prepared.layers)
    if settings.mode == "em" and phase == "em" and settings.free_statistics:
        wanted += mask_layers(prepared.layers, settings.masks.all_layers)
    return tuple(dict.fromkeys(wanted))


def m_step(
    problem: Problem, state: RunState, first: bool = False
) -> tuple[RunState, Draw, dict[str, float], AttentionMaps]:
    """One optimisation step on the vectors: the new state, what was drawn, the values of the loss's
    terms, and the maps that the pass recorded.

    Args:
        problem, state: what the run works on, and where it stands.
        first: whether to look if the diffusion loss reaches the vectors.

    Raises:
        TrainingError: the loss or its gradient is not finite.
        UserError: the diffusion loss does not reach the vectors.
    """
    settings, generator = problem.settings, generator_at(state.generator)
    vectors = learnable(state.vectors)
    learning = replace(state, vectors=vectors)
    drawn, terms, maps = forward_backward(problem, learning, generator, first)
    parameters = named_vectors(vectors)
    rate = settings.learning_rate * rate_factor(state.step, settings.decay_after)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=rate, weight_decay=0.0)
    give_moments(optimizer, parameters, state.moments)
    scale = loss_scale(problem.host)
    values = clip_and_step(optimizer, terms, settings.gradient_clip, state, scale)
    after = replace(
        state,
        vectors=learned(vectors),
        moments={**state.moments, **moments_of(optimizer, parameters)},
        generator=generator.get_state(),
        step=state.step + 1,
    )
    return after, drawn, values, maps


def forward_backward(
    problem: Problem,
    state: RunState,
    generator: torch.Generator,
    first: bool = False,
    mixes: Mixes | None = None,
    untouched: Untouched | None = None,
) -> tuple[Draw, Terms, AttentionMaps]:
    """Draw, predict, and add the loss's gradient, times the host's scale, to the parameters'.

    With `untouched`, the loss also holds what lies around the masks to what the untouched model makes of it.
    """
    host = problem.host
    drawn = draw(problem, state, generator, mixes)
    prepared = problem.pictures[drawn.index]
    if first:
        require_reached(problem, state, drawn)
    conditioning = condition(problem, state, drawn)
    wanted = recorded_layers(problem, prepared, state.phase)
    layers = [layer for layer in prepared.layers if layer.name in wanted]
    Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
    before = without_concepts(problem, drawn, Z_t, untouched) if untouched else None
    # The other layers' maps only become statistics; their graph would be kept for nothing.
    grad = loss_layers(prepared.layers) if problem.settings.has_attention_terms else ()
    recorder = recorder_for(conditioning, prepared.names, layers, host, grad)
    # Backward runs inside the context: gradient checkpointing repeats the forward pass with its hooks.
    with host.record_attention(recorder) if layers else nullcontext():
        prediction = host.predict(Z_t, drawn.t, conditioning)
        terms = loss_terms(problem, state, drawn, prediction, recorder.maps)
        if before is not None:
            terms = with_surroundings(problem, drawn, prediction, before, terms)
        add_gradient(terms["total"], host)
    return drawn, terms, recorder.maps


@torch.no_grad()
def without_concepts(
    problem: Problem, drawn: Draw, Z_t: Float[Tensor, "b c h w"], untouched: Untouched
) -> Float[Tensor, "b c h w"]:
    """What the untouched model predicts of the same noisy latents where the prompts lack the concepts."""
    host = problem.host
    with untouched():
        conditioning = host.encode_prompts([prompt.bare() for prompt in drawn.prompts], {})
        return host.predict(Z_t, drawn.t, conditioning)


def with_surroundings(
    problem: Problem,
    drawn: Draw,
    prediction: Float[Tensor, "b c h w"],
    before: Float[Tensor, "b c h w"],
    terms: Terms,
) -> Terms:
    """The terms with the distance of two predictions outside the masks of each sample's concepts.

    Eq. 3 says nothing there, and weights that learn under it draw their subjects there again.
    """
    weight = problem.host.schedule.weight(drawn.t)
    outside = 1 - present_mask(drawn, prediction)
    kept = losses.masked_diffusion_loss(
        prediction, before, outside, weight, problem.settings.normalisation
    )
    total = terms["total"] + problem.joint.surroundings * kept
    return terms | {"surroundings": kept, "total": total}


def require_reached(problem: Problem, state: RunState, drawn: Draw) -> None:
    """Refuse a model through which the diffusion loss gives the drawn concepts no gradient.

    Eq. 4 alone would go on as if all were well, since it is taken before the attention's output. It
    is looked at in a pass of its own, since a graph that is used twice keeps all that is recomputed.

    Raises:
        UserError: it does not reach the vectors of some concept.
    """
    host = problem.host
    Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
    prediction = host.predict(Z_t, drawn.t, condition(problem, state, drawn))
    plain = replace(problem.settings, attention_weight=0.0, end_of_text_weight=0.0)
    alone = replace(problem, settings=plain)
    loss = loss_terms(alone, state, drawn, prediction, {})["diffusion"] * loss_scale(host)
    if not loss:  # nothing to learn: the masks are empty
        return
    present = {name: state.vectors[name] for subset in drawn.subsets for name in subset}
    named = named_vectors(present)
    gradients: Sequence[Tensor | None] = [None] * len(named)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    cut = [n for n, g in zip(named, gradients, strict=True) if g is None or not g.any()]
    if cut:
        concepts = dict.fromkeys(name.split("/")[1] for name in cut)
        raise UserError(
            f"The diffusion loss does not reach the token of {', '.join(concepts)}, so nothing true can be "
            "learned. Something in the model passes no gradient on: an attention kernel for drawing alone "
            "(SageAttention, FlashAttention), or a patch or wrapper on the model. Switch it off, or learn on "
            "the model from before that patch."
        )


def loss_terms(
    problem: Problem,
    state: RunState,
    drawn: Draw,
    prediction: Float[Tensor, "b c h w"],
    maps: AttentionMaps,
) -> Terms:
    """The terms of the loss by name, and their weighted sum as "total"."""
    settings = problem.settings
    schedule = problem.host.schedule
    target = schedule.target(drawn.Z0, drawn.eps, drawn.t)
    weight = schedule.weight(drawn.t)
    masks, present = drawn.masks, drawn.present
    terms = {"diffusion": diffusion_term(settings, drawn, prediction, target, weight)}
    weights = {"diffusion": 1.0}
    if settings.mode != "none" and settings.has_attention_terms:
        prepared = problem.pictures[drawn.index]
        terms |= attention_terms(settings, loss_maps(prepared, maps), masks, present)
        weights |= {
            "attention": settings.attention_weight,
            "end_of_text": settings.end_of_text_weight,
        }
    terms["total"] = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return terms


def diffusion_term(
    settings: EMSettings,
    drawn: Draw,
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """Eq. 3 under the union of the masks of the concepts present in each sample, or Eq. 1."""
    if not settings.masks_loss:
        return losses.diffusion_loss(prediction, target, weight)
    mask = present_mask(drawn, prediction)
    return losses.masked_diffusion_loss(prediction, target, mask, weight, settings.normalisation)


def present_mask(drawn: Draw, like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """The union of the masks of the concepts present in each sample, at the size of `like`."""
    small = resize(drawn.masks, (like.shape[-2], like.shape[-1]), "mask")
    return union(small * drawn.present[:, :, None, None])


def loss_maps(prepared: Prepared, maps: AttentionMaps) -> Float[Tensor, "b k h w"]:
    """Mean of the loss's layers (16x16): the concepts' maps, then the end-of-text token's."""
    layers = loss_layers(prepared.layers)
    size = maps[layers[0]].shape[-2:]
    return mean_maps(maps, layers, (size[0], size[1]))


def attention_terms(
    settings: EMSettings,
    maps: Float[Tensor, "b k1 h w"],
    masks: Float[Tensor, "b k H W"],
    present: Float[Tensor, "b k"],
) -> Terms:
    """Eq. 4, and ViCo's regulariser where it is on. The last map is the end-of-text token's."""
    A, end = maps[:, :-1], maps[:, -1:]
    small = resize(masks, (A.shape[-2], A.shape[-1]), "mask")
    terms = {"attention": losses.attention_loss(A, small, present)}
    if settings.end_of_text_weight:
        terms["end_of_text"] = losses.end_of_text_regulariser(A, end, present)
    return terms
