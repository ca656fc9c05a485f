"""The M-step: one optimisation step under the present masks (VCD Eq. 3 + lambda Eq. 4)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import TrainingError
from ..masks.measures import union
from ..masks.resizing import resize_masks
from ..model.layers import loss_layers, mask_layers
from ..model.protocol import Conditioning
from ..model.recording import AttentionMaps, mean_maps
from ..model.schedules import stratified_timesteps
from ..settings import EMSettings
from . import losses
from .maps import like_noise, recorder_for
from .problem import Prepared, Problem
from .state import RunState

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """The random part of an M-step: b noisy latents of one picture, each with a subset of its concepts.

    Attributes:
        index: which picture.
        subsets: the concepts' names in the order in which each prompt has them.
        present: [b, k] 1 where the picture's k-th concept stands in the sample's prompt.
        flipped: the picture is mirrored.
    """

    index: int
    subsets: tuple[tuple[str, ...], ...]
    present: Float[Tensor, "b k"]
    flipped: bool
    t: Int[Tensor, " b"]
    eps: Float[Tensor, "b c h w"]
    Z0: Float[Tensor, "b c h w"]


def draw(problem: Problem, state: RunState) -> Draw:
    """Pick a picture, subsets of its concepts, timesteps and noise from the state's generator."""
    settings, host, g = problem.settings, problem.host, state.generator
    index = int(torch.randint(len(problem.pictures), (), generator=g))
    prepared = problem.pictures[index]
    subsets = tuple(draw_subset(prepared.names, settings, g) for _ in range(settings.batch))
    flipped = settings.flip and bool(torch.rand((), generator=g) < 0.5)
    Z0 = prepared.Z0_flipped if flipped and prepared.Z0_flipped is not None else prepared.Z0
    t = stratified_timesteps(settings.batch, 0.0, 1.0, len(host.schedule), g).to(host.device)
    present = torch.tensor(
        [[float(n in s) for n in prepared.names] for s in subsets], device=host.device
    )
    eps = like_noise(Z0, settings.batch, g)
    return Draw(index, subsets, present, flipped, t, eps, Z0.expand_as(eps))


def draw_subset(names: Sequence[str], settings: EMSettings, g: torch.Generator) -> tuple[str, ...]:
    """All concepts in the prompt's order, or a random ordered subset (Break-a-Scene's union sampling)."""
    if not settings.draws_subsets:
        return tuple(names)
    order = torch.randperm(len(names), generator=g).tolist()
    count = int(torch.randint(1, len(names) + 1, (), generator=g))
    return tuple(names[i] for i in order[:count])


def condition(problem: Problem, state: RunState, drawn: Draw) -> Conditioning:
    """Encode the drawn prompts; without union sampling the prompt stands as the user wrote it."""
    prompt = problem.pictures[drawn.index].example.prompt
    sampled = problem.settings.draws_subsets
    prompts = [prompt.subset(subset) if sampled else prompt for subset in drawn.subsets]
    return problem.host.encode_prompts(prompts, state.vectors)


def recorded_layers(problem: Problem, prepared: Prepared, phase: str) -> tuple[str, ...]:
    """Layers whose maps a step needs: the loss's, and where the masks are re-estimated theirs too."""
    settings, layers = problem.settings, problem.host.layers
    if settings.mode == "none":
        return ()
    wanted: tuple[str, ...] = ()
    if settings.attention_weight + settings.end_of_text_weight > 0:
        wanted += loss_layers(layers, prepared.latent_size)
    if settings.mode == "em" and phase == "em" and settings.free_statistics:
        wanted += mask_layers(layers, prepared.latent_size, settings.masks.all_layers)
    return tuple(dict.fromkeys(wanted))


def m_step(problem: Problem, state: RunState) -> tuple[Draw, Terms, AttentionMaps]:
    """One optimisation step; also gives the draw, the loss terms and the maps that its pass recorded.

    Raises:
        TrainingError: the loss or its gradient is not finite; vectors and weights are as before.
    """
    state.optimizer.zero_grad(set_to_none=True)
    drawn, terms, maps = forward_backward(problem, state)
    update(state, terms["total"], problem.settings.gradient_clip)
    return drawn, terms, maps


def forward_backward(problem: Problem, state: RunState) -> tuple[Draw, Terms, AttentionMaps]:
    """Draw, predict, and add the loss's gradient to the parameters'."""
    host = problem.host
    drawn = draw(problem, state)
    prepared = problem.pictures[drawn.index]
    conditioning = condition(problem, state, drawn)
    layers = recorded_layers(problem, prepared, state.phase)
    recorder = recorder_for(
        host, conditioning, prepared.names, prepared.latent_size, layers, grad=True
    )
    # Backward runs inside the context: gradient checkpointing repeats the forward pass with its hooks.
    with host.record_attention(recorder) if layers else nullcontext():
        Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
        prediction = host.predict_noise(Z_t, drawn.t, conditioning)
        terms = loss_terms(problem, state, drawn, prediction, recorder.maps)
        terms["total"].backward()
    return drawn, terms, recorder.maps


def update(state: RunState, loss: Tensor, gradient_clip: float) -> None:
    """Clip and step, unless something is not finite."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise TrainingError(
            f"The loss is not finite at step {state.step + 1} of the {state.phase} phase. "
            "Use a smaller learning rate or a wider number type. What was learned before is kept."
        )
    state.optimizer.step()


def loss_terms(
    problem: Problem,
    state: RunState,
    drawn: Draw,
    prediction: Float[Tensor, "b c h w"],
    maps: AttentionMaps,
) -> Terms:
    """The terms of the loss by name, and their weighted sum as "total"."""
    settings = problem.settings
    target = problem.host.schedule.target(drawn.Z0, drawn.eps, drawn.t)
    masks = state.pictures[drawn.index].masks
    masks = masks.flip(-1) if drawn.flipped else masks
    terms = {"diffusion": diffusion_term(settings, prediction, target, masks, drawn.present)}
    weights = {"diffusion": 1.0}
    if settings.mode != "none" and settings.attention_weight + settings.end_of_text_weight > 0:
        prepared = problem.pictures[drawn.index]
        terms |= attention_terms(settings, loss_maps(problem, prepared, maps), masks, drawn.present)
        weights |= {
            "attention": settings.attention_weight,
            "end_of_text": settings.end_of_text_weight,
        }
    terms["total"] = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return terms


def diffusion_term(
    settings: EMSettings,
    prediction: Float[Tensor, "b c h w"],
    target: Float[Tensor, "b c h w"],
    masks: Float[Tensor, "k H W"],
    present: Float[Tensor, "b k"],
) -> Float[Tensor, ""]:
    """Eq. 3 under the union of the masks of the concepts present in each sample, or Eq. 1."""
    if not settings.masks_loss:
        return losses.diffusion_loss(prediction, target)
    small = resize_masks(masks, (prediction.shape[-2], prediction.shape[-1]))
    mask = union(small[None] * present[:, :, None, None])
    return losses.masked_diffusion_loss(prediction, target, mask, settings.normalisation)


def loss_maps(
    problem: Problem, prepared: Prepared, maps: AttentionMaps
) -> Float[Tensor, "b k h w"]:
    """Mean of the loss's layers (16x16): the concepts' maps, then the end-of-text token's."""
    layers = loss_layers(problem.host.layers, prepared.latent_size)
    size = maps[layers[0]].shape[-2:]
    return mean_maps(maps, layers, (size[0], size[1]))


def attention_terms(
    settings: EMSettings,
    maps: Float[Tensor, "b k1 h w"],
    masks: Float[Tensor, "k H W"],
    present: Float[Tensor, "b k"],
) -> Terms:
    """Eq. 4, and ViCo's regulariser where it is on. The last map is the end-of-text token's."""
    A, end = maps[:, :-1], maps[:, -1:]
    small = resize_masks(masks, (A.shape[-2], A.shape[-1]))[None].expand_as(A)
    terms = {"attention": losses.attention_loss(A, small, present)}
    if settings.end_of_text_weight:
        terms["end_of_text"] = losses.end_of_text_regulariser(A, end, present)
    return terms
