"""Tokens and weights together, masks frozen (VCD, last stage; Break-a-Scene's phase 2)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..model.adapters import TrainableParts
from ..model.protocol import loss_scale, to_host
from ..prompts import ConceptPrompt
from . import losses
from .loop import Step, StepEvent, recorded
from .m_step import Mixes, Terms, Untouched, forward_backward
from .maps import like_noise
from .optimizer import (
    LearnableVectors,
    add_gradient,
    clip_and_step,
    give_moments,
    learnable,
    learned,
    moments_of,
    named_vectors,
    rate_factor,
    with_fitting_scale,
)
from .problem import Problem
from .seg_mix import make_mixes
from .state import RunState, generator_at

UNET = re.compile(r"weights/(unet|diffusion_model)\.")  # as the two hosts name them


@dataclass(frozen=True)
class Learner:
    """What the joint phase changes in place.

    Attributes:
        vectors: the concepts', with gradients.
        parameters: name, as in the moments -> everything that the optimizer changes.
        optimizer: AdamW over the parameters.
        rates: full learning rates of the optimizer's groups.
        priors: latents of the prior's pictures, or None where the prior is off.
        mixes: see :mod:`em_core.method.seg_mix`; None where it is off.
        untouched: gives the model as it was, to which what lies around the masks is held; None where it is not.
    """

    vectors: LearnableVectors
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.AdamW
    rates: tuple[float, ...]
    priors: Tensor | None
    mixes: Mixes | None
    untouched: Untouched | None


def learn_joint(problem: Problem, state: RunState) -> Iterator[Step]:
    """Run the joint phase from wherever `state` stands; yields each step's event and its new state.

    While it runs, the host's model acts with the weights under training; it is as it was when the
    generator ends or is closed.

    Raises:
        TrainingError: a loss is not finite.
    """
    joint = problem.joint
    if joint.kind == "none":
        return
    if state.phase == "em":
        state = replace(state, phase="joint", step=0, moments={})
    priors, mixes = prior_latents(problem), make_mixes(problem, state)
    generator = generator_at(state.generator)
    with trainable_parts(problem, state, generator) as parts:
        state = replace(state, weights=weights_of(parts), generator=generator.get_state())
        learner = make_learner(problem, state, parts, priors, mixes)
        while state.step < joint.steps:
            step = partial(joint_step, problem, state, learner)
            event, state = with_fitting_scale(problem.host, step)
            yield event, state


def trainable_parts(
    problem: Problem, state: RunState, generator: torch.Generator
) -> AbstractContextManager[TrainableParts]:
    """The parts of the model that the joint phase learns, as the state has them."""
    joint = problem.joint
    return problem.host.trainable(
        joint.kind, state.weights, generator, joint.rank, joint.lora_alpha
    )


def weights_of(parts: TrainableParts) -> dict[str, Tensor]:
    """The parts' very tensors, without their gradients."""
    return {name: p.detach() for name, p in parts.parameters.items()}


def make_learner(
    problem: Problem,
    state: RunState,
    parts: TrainableParts,
    priors: Tensor | None,
    mixes: Mixes | None,
) -> Learner:
    """AdamW with one group for the UNet's weights, one for the text encoders' and, unless they are
    kept, one for the tokens."""
    joint, vectors = problem.joint, learnable(state.vectors)
    # By name, since a file does not keep the order of the weights.
    weights = {f"weights/{name}": parts.parameters[name] for name in sorted(parts.parameters)}
    tokens = named_vectors(vectors) if joint.token_learning_rate is not None else {}
    text = {name: p for name, p in weights.items() if not UNET.match(name)}
    unet = [p for name, p in weights.items() if name not in text]
    groups: list[dict] = [{"params": unet, "lr": joint.weights_rate}]
    groups.append({"params": list(text.values()), "lr": joint.text_rate})
    if tokens:
        rate = joint.token_learning_rate
        groups.append({"params": list(tokens.values()), "lr": rate, "weight_decay": 0.0})
    # All whole weights at once would need as much memory again as they take.
    foreach = False if joint.kind in ("cross_attention", "full") else None
    optimizer = torch.optim.AdamW(groups, lr=joint.weights_rate, weight_decay=1e-2, foreach=foreach)
    parameters = weights | tokens
    give_moments(optimizer, parameters, state.moments)
    rates = tuple(float(group["lr"]) for group in groups)
    keeps = joint.surroundings > 0 and problem.settings.masks_loss
    untouched = parts.untouched if keeps else None
    return Learner(vectors, parameters, optimizer, rates, priors, mixes, untouched)


def joint_step(problem: Problem, state: RunState, learner: Learner) -> Step:
    """One step on tokens and weights. Nothing changes before its last action, the optimizer's step."""
    generator = generator_at(state.generator)
    learner.optimizer.zero_grad(set_to_none=True)
    share = rate_factor(state.step, problem.joint.decay_after)
    for group, rate in zip(learner.optimizer.param_groups, learner.rates, strict=True):
        group["lr"] = rate * share
    learning = replace(state, vectors=learner.vectors)
    _, terms, _ = forward_backward(
        problem, learning, generator, mixes=learner.mixes, untouched=learner.untouched
    )
    if learner.priors is not None:
        terms = terms | prior_term(problem, learner.priors, generator)
    scale = loss_scale(problem.host)
    values = clip_and_step(learner.optimizer, terms, problem.settings.gradient_clip, state, scale)
    after = replace(
        state,
        vectors=learned(learner.vectors),
        moments=moments_of(learner.optimizer, learner.parameters),
        generator=generator.get_state(),
        step=state.step + 1,
    )
    return recorded(after, StepEvent("joint", after.step, problem.joint.steps, values))


def learned_weights(problem: Problem, state: RunState) -> dict[str, Tensor]:
    """What a concept file keeps of the joint phase; nothing before it has begun."""
    if problem.joint.kind == "none" or not state.weights:
        return {}
    with trainable_parts(problem, state, generator_at(state.generator)) as parts:
        return parts.learned()


def prior_latents(problem: Problem) -> Tensor | None:
    """Latents of pictures that the untouched model draws for the prior's prompt, or None where it is off."""
    joint, host = problem.joint, problem.host
    if joint.prior_weight == 0:
        return None
    seeds = range(problem.settings.seed, problem.settings.seed + joint.prior_pictures)
    prompt = ConceptPrompt((joint.prior_prompt,))
    pictures = [host.draw(prompt, {}, [seed]) for seed in seeds]
    return torch.cat([host.encode_image(picture * 2 - 1) for picture in pictures])


def prior_term(problem: Problem, priors: Tensor, generator: torch.Generator) -> Terms:
    """Prior preservation (DreamBooth; Break-a-Scene): Eq. 1 on the model's own pictures; adds its gradient."""
    host, batch = problem.host, problem.settings.batch
    drawn = torch.randint(len(priors), (batch,), generator=generator)
    Z0 = torch.stack([priors[i] for i in drawn.tolist()])
    t = to_host(host.schedule.draw_times(batch, generator), host)
    eps = like_noise(Z0, batch, generator)
    conditioning = host.encode_prompts([ConceptPrompt((problem.joint.prior_prompt,))] * batch, {})
    prediction = host.predict(host.schedule.add_noise(Z0, eps, t), t, conditioning)
    target = host.schedule.target(Z0, eps, t)
    loss = losses.diffusion_loss(prediction, target, host.schedule.weight(t))
    add_gradient(problem.joint.prior_weight * loss, host)
    return {"prior": loss}
