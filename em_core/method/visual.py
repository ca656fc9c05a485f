"""The visual phase: image attention learns to look at a reference of each concept (ViCo).

Source: Hao et al. 2023, arXiv 2306.00971. A step predicts noisy latents of one picture while a clean
reference of each concept goes through the same UNet at the same time and with the same prompt. Of
ViCo's own ways those that measurements led us away from are options; see `VisualSettings`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..model.adapters import TrainableParts
from ..model.layers import AttentionLayer, loss_layers
from ..model.protocol import Conditioning, VisualModel, loss_scale, visual_model
from ..model.recording import AttentionMaps, AttentionRecorder
from ..model.visual import (
    Blocks,
    Place,
    VisualPass,
    blocks_of,
    init_blocks,
    require_places,
    trainable_blocks,
)
from ..settings import VisualSettings
from . import losses
from .joint import Learner, weights_of
from .loop import Step, StepEvent, recorded, start_event
from .m_step import Draw, Terms, condition, draw, loss_terms, names_found
from .maps import recorder_for
from .optimizer import (
    add_gradient,
    clip_and_step,
    give_moments,
    learnable,
    learned,
    moments_of,
    named_vectors,
    with_fitting_scale,
)
from .problem import Problem
from .references import Choice, References, View
from .state import RunState, generator_at

WEIGHT_DECAY = 1e-2


def learn_visual(problem: Problem, state: RunState) -> Iterator[Step]:
    """Run the visual phase from wherever `state` stands; yields each step's event and its new state.

    Raises:
        TrainingError: a loss is not finite.
        UserError: the model has no places for image attention, or no concept was found.
    """
    visual = problem.visual
    if visual is None:
        return
    visual_model(problem.host)
    problem = replace(problem, settings=replace(problem.settings, batch=visual.batch))
    if state.phase != "visual":
        state = replace(state, phase="visual", step=0, moments={})
    if state.step == 0 and not state.curves:
        event, state = recorded(state, start_event(problem, state))
        yield event, state
    found = names_found(problem, state)
    references = References(problem, state.pictures, found)
    generator = generator_at(state.generator)
    with trainable_parts(problem, state, found, generator) as parts:
        state = replace(state, weights=weights_of(parts), generator=generator.get_state())
        learner = make_learner(problem, state, parts, visual)
        while state.step < visual.steps:
            step = partial(visual_step, problem, state, learner, references, visual)
            event, state = with_fitting_scale(problem.host, step)
            yield event, state


def places_of(problem: Problem, index: int = 0) -> tuple[Place, ...]:
    """ViCo's places for the latents of a picture."""
    height, width = problem.pictures[index].Z0.shape[-2:]
    return visual_model(problem.host).image_places((height, width))


def trainable_parts(
    problem: Problem, state: RunState, found: Sequence[Sequence[str]], generator: torch.Generator
) -> AbstractContextManager[TrainableParts]:
    """Blocks for every concept that was found somewhere, as the state has them or new ones."""
    places, settings = places_of(problem), problem.visual
    names = list(dict.fromkeys(name for of in found for name in of))
    if not names:
        raise UserError(
            "None of the concepts was found in any picture, so there is nothing to look at. Name them by other "
            "words, or give masks of your own (mode 'given')."
        )
    zero = settings is None or settings.zero_init
    values = state.weights or init_blocks(places, names, generator, zero)
    require_places(values, places)
    return trainable_blocks(values, problem.host.device)


def make_learner(
    problem: Problem, state: RunState, parts: TrainableParts, visual: VisualSettings
) -> Learner:
    """AdamW with a group for the blocks and, unless they are kept, one for the tokens."""
    vectors = learnable(state.vectors)
    weights = {f"weights/{name}": parts.parameters[name] for name in sorted(parts.parameters)}
    tokens = named_vectors(vectors) if visual.token_learning_rate is not None else {}
    groups: list[dict] = [{"params": list(weights.values()), "lr": visual.learning_rate}]
    if tokens:
        decay = visual.token_weight_decay
        group = {"params": list(tokens.values()), "weight_decay": decay}
        groups.append(group | {"lr": visual.token_learning_rate})
    else:
        vectors = learned(state.vectors)
    # All at once would need as much memory again as the blocks take.
    optimizer = torch.optim.AdamW(
        groups, lr=visual.learning_rate, weight_decay=WEIGHT_DECAY, foreach=False
    )
    parameters = weights | tokens
    give_moments(optimizer, parameters, state.moments)
    return Learner(
        vectors, parameters, optimizer, rates=(), priors=None, mixes=None, untouched=None
    )


def visual_step(
    problem: Problem,
    state: RunState,
    learner: Learner,
    references: References,
    visual: VisualSettings,
) -> Step:
    """One step on blocks and tokens. Nothing changes before its last action, the optimizer's step."""
    generator = generator_at(state.generator)
    learner.optimizer.zero_grad(set_to_none=True)
    drawn = draw(problem, state, generator)
    start = "weights/"
    values = {
        n.removeprefix(start): p for n, p in learner.parameters.items() if n.startswith(start)
    }
    blocks = blocks_of(values, places_of(problem, drawn.index))
    look = choose(problem, drawn, references, blocks, generator)
    learning = replace(state, vectors=learner.vectors)
    terms = forward_backward(problem, learning, drawn, look, blocks, visual)
    scale, clip = loss_scale(problem.host), problem.settings.gradient_clip
    measured = clip_and_step(learner.optimizer, terms, clip, state, scale)
    after = replace(
        state,
        vectors=learned(learner.vectors),
        moments=moments_of(learner.optimizer, learner.parameters),
        generator=generator.get_state(),
        step=state.step + 1,
    )
    return recorded(after, StepEvent("visual", after.step, visual.steps, measured))


@dataclass(frozen=True)
class Look:
    """What the samples of a step look at.

    Attributes:
        views: the references, each once.
        source: concept -> number of its reference.
        present: concept -> which samples' prompts have it, 1 or 0.
    """

    views: tuple[View, ...]
    source: Mapping[str, int]
    present: Mapping[str, Tensor]


def choose(
    problem: Problem,
    drawn: Draw,
    references: References,
    blocks: Blocks,
    generator: torch.Generator,
) -> Look:
    """Draw a reference for each concept that a sample's prompt has; those of one picture share a view."""
    prepared = problem.pictures[drawn.index]
    named = [n for n in prepared.names if n in blocks and n in references.found[drawn.index]]
    acting = [name for name in named if any(name in subset for subset in drawn.subsets)]
    choices: dict[str, Choice] = {}
    for name in acting:
        choice = references.choose(drawn.index, name, generator)
        same = [other for other in choices.values() if other[0] == choice[0]]
        choices[name] = same[0] if same else choice
    distinct = list(dict.fromkeys(choices.values()))
    views = tuple(
        references.view(choice, prepared.size, itself=choice[0] == drawn.index)
        for choice in distinct
    )
    columns = [prepared.names.index(name) for name in acting]
    present = dict(zip(acting, drawn.present[:, columns].unbind(1), strict=True))
    return Look(views, {name: distinct.index(c) for name, c in choices.items()}, present)


def forward_backward(
    problem: Problem,
    state: RunState,
    drawn: Draw,
    look: Look,
    blocks: Blocks,
    visual: VisualSettings,
) -> Terms:
    """Predict beside the references, and add the loss's gradient, times the host's scale, to the
    parameters'."""
    host, samples = visual_model(problem.host), len(drawn.t)
    plan = pass_of(problem, drawn, look, blocks, visual)
    conditioning = condition(problem, state, drawn)
    Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
    own = list(range(samples))
    Z_ref = torch.cat([view.Z0.expand(samples, -1, -1, -1) for view in look.views])
    rows, t_ref = own * len(look.views), drawn.t.repeat(len(look.views))
    learns_tokens = any(v.requires_grad for of in state.vectors.values() for v in of.values())
    joined = visual.reference_gradient and learns_tokens
    if joined:
        rows, Z_t, t = [*rows, *own], torch.cat([Z_ref, Z_t]), torch.cat([t_ref, drawn.t])
        conditioning = conditioning.rows(rows)
    else:
        t = drawn.t
        remember(problem, host, plan, drawn, conditioning.rows(rows), Z_ref, t_ref, visual)
    recorder = recorder_of(problem, drawn, conditioning, visual, learns_tokens)
    plan.maps = recorder.maps
    places = list(plan.places.values())
    with host.record_attention(recorder), host.transformed(places, plan.act):
        prediction = host.predict(Z_t, t, conditioning)[-samples:]
        maps = {name: x[-samples:] for name, x in recorder.maps.items()}
        terms = terms_of(problem, state, drawn, prediction, maps, learns_tokens)
        if visual.end_of_text_weight and learns_tokens:
            of_stream = {
                n: x[: len(x) - samples] if joined else x for n, x in recorder.maps.items()
            }
            regular = regulariser(of_stream, places, drawn.present)
            total = terms["total"] + visual.end_of_text_weight * regular
            terms = terms | {"end_of_text": regular, "total": total}
        add_gradient(terms["total"], host)
    return terms


def pass_of(
    problem: Problem, drawn: Draw, look: Look, blocks: Blocks, visual: VisualSettings
) -> VisualPass:
    """What image attention does in the step's pass."""
    return VisualPass(
        names=problem.pictures[drawn.index].names,
        places={place.name: place for place in places_of(problem, drawn.index)},
        blocks=blocks,
        samples=len(drawn.t),
        source=look.source,
        present=look.present,
        maps={},
        seen={
            name: look.views[number].seen[name]
            for name, number in look.source.items()
            if name in look.views[number].seen
        },
        gated=visual.gated,
    )


@torch.no_grad()
def remember(
    problem: Problem,
    host: VisualModel,
    plan: VisualPass,
    drawn: Draw,
    conditioning: Conditioning,
    Z_ref: Tensor,
    t: Tensor,
    visual: VisualSettings,
) -> None:
    """Let the references go through the UNet, and keep their features and maps for the step's pass."""
    features: dict[str, Tensor] = {}

    def keep(place: str, x: Tensor) -> Tensor:
        features[place] = x
        return x

    layers = layers_at(problem, drawn, plan.places) if visual.key_masks == "otsu" else []
    names = problem.pictures[drawn.index].names
    recorder = recorder_for(conditioning, names, layers, problem.host)
    with host.record_attention(recorder), host.transformed(list(plan.places.values()), keep):
        host.predict(Z_ref, t, conditioning)
    plan.features, plan.reference_maps = features, recorder.maps


def layers_at(problem: Problem, drawn: Draw, places: Mapping[str, Place]) -> list[AttentionLayer]:
    """The layers that read text at the places of image attention."""
    return [layer for layer in problem.pictures[drawn.index].layers if layer.name in places]


def recorder_of(
    problem: Problem,
    drawn: Draw,
    conditioning: Conditioning,
    visual: VisualSettings,
    learns_tokens: bool,
) -> AttentionRecorder:
    """A recorder of the maps that the step needs, with a graph where a loss looks at them."""
    prepared, settings = problem.pictures[drawn.index], problem.settings
    places = [place.name for place in places_of(problem, drawn.index)]
    of_loss: tuple[str, ...] = ()
    if settings.mode != "none" and settings.has_attention_terms and learns_tokens:
        of_loss = loss_layers(prepared.layers)
    grad = [*of_loss, *(places if visual.end_of_text_weight and learns_tokens else [])]
    layers = [layer for layer in prepared.layers if layer.name in {*of_loss, *places}]
    return recorder_for(conditioning, prepared.names, layers, problem.host, grad)


def terms_of(
    problem: Problem,
    state: RunState,
    drawn: Draw,
    prediction: Tensor,
    maps: AttentionMaps,
    learns_tokens: bool,
) -> Terms:
    """The EM loop's own terms; those on attention only where tokens are learned."""
    weight = problem.settings.attention_weight if learns_tokens else 0.0
    plain = replace(problem.settings, attention_weight=weight, end_of_text_weight=0.0)
    return loss_terms(replace(problem, settings=plain), state, drawn, prediction, maps)


def regulariser(maps: AttentionMaps, places: Sequence[Place], present: Tensor) -> Tensor:
    """ViCo's regulariser, summed over the places; the last column is the end-of-text token's."""
    total = present.new_zeros(())
    for place in places:
        A = maps[place.name]
        of_rows = present.repeat(len(A) // len(present), 1)
        total = total + losses.end_of_text_regulariser(A[:, :-1], A[:, -1:], of_rows)
    return total
