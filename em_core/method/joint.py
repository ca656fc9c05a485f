"""Tokens and weights together, masks frozen (VCD, last stage; Break-a-Scene's phase 2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..model.adapters import DIFF, init_lora, lora_applied, restored
from ..model.schedules import stratified_timesteps
from ..prompts import ConceptPrompt
from . import losses
from .loop import StepEvent
from .m_step import Terms, forward_backward, update
from .maps import like_noise
from .problem import Problem
from .state import RunState


def learn_joint(problem: Problem, state: RunState) -> Iterator[StepEvent]:
    """Run the joint phase from wherever `state` stands; yields an event per step.

    While it runs, the host's model acts with the weights under training; it is as it was when the
    generator ends or is closed. `state.weights` then holds what was learned.

    Raises:
        TrainingError: a loss is not finite.
    """
    joint = problem.joint
    if joint.kind == "none":
        return
    if state.phase == "em":
        state.phase, state.step = "joint", 0
    priors = prior_latents(problem)
    with training_weights(problem, state):
        state.use_optimizer(make_optimizer(problem, state))
        while state.step < joint.steps:
            yield joint_step(problem, state, priors)


def joint_step(problem: Problem, state: RunState, priors: Tensor | None) -> StepEvent:
    """One step on tokens and weights."""
    state.optimizer.zero_grad(set_to_none=True)
    _, terms, _ = forward_backward(problem, state)
    if priors is not None:
        terms = terms | prior_term(problem, state, priors)
    update(state, sum_of(terms), problem.settings.gradient_clip)
    state.step += 1
    values = {name: float(value.detach()) for name, value in terms.items()}
    state.log(state.step, {f"joint_loss/{name}": value for name, value in values.items()})
    return StepEvent("joint", state.step, problem.joint.steps, values)


def sum_of(terms: Terms) -> Tensor:
    """What must be finite: the loss and, where it is on, the prior's."""
    return terms["total"] + terms.get("prior", torch.zeros_like(terms["total"]))


def make_optimizer(problem: Problem, state: RunState) -> torch.optim.AdamW:
    """AdamW with one group for the weights and, unless they are kept, one for the tokens."""
    joint = problem.joint
    groups: list[dict] = [{"params": in_order(state.weights), "lr": joint.weights_rate}]
    if joint.token_learning_rate is not None:
        tokens = [v for of in state.vectors.values() for v in of.values()]
        groups.append({"params": tokens, "lr": joint.token_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=joint.weights_rate, weight_decay=1e-2)


def in_order(weights: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """By name, since a file does not keep the order that the optimizer's moments are counted in."""
    return [weights[name] for name in sorted(weights)]


@contextmanager
def training_weights(problem: Problem, state: RunState) -> Iterator[None]:
    """Make `state.weights` act in the model, and trainable, while the context is open."""
    host, joint = problem.host, problem.joint
    if joint.kind == "none":
        yield
    elif joint.kind == "lora":
        layers = host.adaptable_layers()
        state.weights = state.weights or init_lora(layers, joint.rank, state.generator)
        with lora_applied(layers, state.weights, joint.alpha / joint.rank):
            yield
    else:
        parameters = dict(host.weights(joint.kind))
        with restored(parameters):
            take_over(parameters, state.weights)
            state.weights = parameters
            try:
                yield
            finally:
                state.weights = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}


def take_over(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Make the parameters trainable, with `values` where there are some.

    Raises:
        UserError: they are too coarse for the small steps of training.
    """
    coarse = sorted({str(p.dtype) for p in parameters.values() if p.dtype != torch.float32})
    if coarse:
        raise UserError(
            f"Whole weights are learned in float32, got {', '.join(coarse)}. Load the model in float32, "
            "or learn a LoRA."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.requires_grad_(True)
            if name in values:
                p.copy_(values[name])


def learned_weights(problem: Problem, state: RunState) -> dict[str, Tensor]:
    """What the joint phase learned: LoRA factors, or `<path>.diff` against the model's own weights."""
    joint = problem.joint
    if joint.kind == "lora":
        return {name: w.detach().clone() for name, w in state.weights.items()}
    if joint.kind == "none" or not state.weights:
        return {}
    own = problem.host.weights(joint.kind)
    return {name + DIFF: w.detach() - own[name].detach() for name, w in state.weights.items()}


def prior_latents(problem: Problem) -> Tensor | None:
    """Latents of pictures that the untouched model draws for the prior's prompt, or None where it is off."""
    joint, host = problem.joint, problem.host
    if joint.prior_weight == 0:
        return None
    seeds = range(problem.settings.seed, problem.settings.seed + joint.prior_pictures)
    prompt = ConceptPrompt((joint.prior_prompt,))
    pictures = [host.generate(prompt, {}, [seed]) for seed in seeds]
    return torch.cat([host.encode_image(picture * 2 - 1) for picture in pictures])


def prior_term(problem: Problem, state: RunState, priors: Tensor) -> Terms:
    """Prior preservation (DreamBooth; Break-a-Scene): Eq. 1 on the model's own pictures; adds its gradient."""
    host, g, batch = problem.host, state.generator, problem.settings.batch
    Z0 = priors[torch.randint(len(priors), (batch,), generator=g).tolist()]
    t = stratified_timesteps(batch, 0.0, 1.0, len(host.schedule), g).to(host.device)
    eps = like_noise(Z0, batch, g)
    conditioning = host.encode_prompts([ConceptPrompt((problem.joint.prior_prompt,))] * batch, {})
    prediction = host.predict_noise(host.schedule.add_noise(Z0, eps, t), t, conditioning)
    loss = losses.diffusion_loss(prediction, host.schedule.target(Z0, eps, t))
    (problem.joint.prior_weight * loss).backward()
    return {"prior": loss}
