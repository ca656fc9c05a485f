"""A request to learn, from finding it finished to training it."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import torch

from ...em_core.errors import OUT_OF_MEMORY, TrainingError, UserError
from ...em_core.examples import Example
from ...em_core.method.problem import Problem, prepare
from ...em_core.method.start import initialise, resume
from ...em_core.method.state import RunState
from ...em_core.runs.concept_set import ConceptSet, conclude
from ...em_core.runs.runner import run, save
from ...em_core.settings import EMSettings, JointSettings
from ..host.checkpointing import checkpointing
from ..host.comfy_host import learning_host
from ..host.families import identify
from .plans import Plan, choose, estimate, preflight, weight_type
from .progress import NodeProgress
from .rollback import Rollback
from .store import RunStore, key_of


@dataclass(frozen=True)
class Request:
    """What LearnConcepts was asked for."""

    model: Any
    clip: Any
    vae: Any
    examples: tuple[Example, ...]
    em: EMSettings
    joint: JointSettings
    preset: str


def learn_concepts(request: Request, store: RunStore | None = None) -> ConceptSet:
    """The concepts of a request: those of a finished run with the same inputs, or newly learned.

    Raises:
        UserError: bad input, or not enough memory.
        TrainingError: a loss is not finite.
    """
    store = store or RunStore()
    plans = choose(request.preset, request.joint, request.model)
    if request.em.batch > plans[0].batch:
        logging.warning(
            "The preset %s takes at most %d samples a step, not %d.",
            plans[0].name, plans[0].batch, request.em.batch,
        )  # fmt: skip
    models = (request.model, request.clip, request.vae)
    key = key_of(*models, request.examples, request.em, request.joint, plans[0].name)
    found = store.finished(key)
    if found is not None:
        logging.info("Concepts %s were learned before; nothing is trained.", ", ".join(found.names))
        return found
    concepts = train_within_memory(request, plans, key, store)
    store.keep(key, concepts)
    return concepts


def train_within_memory(
    request: Request, plans: tuple[Plan, ...], key: str, store: RunStore
) -> ConceptSet:
    """Train with the first plan, and where memory runs out go on with the next smaller one."""
    for plan in plans:
        try:
            return train(request, plan, key, store)
        except OUT_OF_MEMORY as error:
            logging.warning("Out of memory with preset %s (%s).", plan.name, error)
        mm.unload_all_models()
        mm.soft_empty_cache()
    raise UserError(
        f"Not enough memory to learn, even with the preset {plans[-1].name}. Use a smaller resolution or "
        "batch, or learn tokens only (joint phase none). The model has been unloaded."
    )


def train(request: Request, plan: Plan, key: str, store: RunStore) -> ConceptSet:
    """Learn on private copies of the weights."""
    dtype = weight_type(plan, request.model)
    # Only here are the text encoders' own weights learned, which half precision is too coarse for.
    clip_dtype = torch.float32 if request.joint.kind == "full" else None
    em = replace(request.em, batch=min(request.em.batch, plan.batch))
    side = em.image_side or identify(request.model, request.clip).image_side
    factor = int(request.vae.spacial_compression_encode())
    preflight(estimate(request.model, request.clip, plan, em, side, factor), plan, request.model)
    with (
        learning_host(request.model, request.clip, request.vae, dtype, clip_dtype) as host,
        checkpointing(host.unet, plan.checkpointing),
    ):
        problem = replace(prepare(host, request.examples, em, request.joint), key=key)
        state = state_of(problem, store)
        drive(problem, state, store)
        return conclude(problem, state)


def state_of(problem: Problem, store: RunStore) -> RunState:
    """Where a stopped run with the same inputs was left, or the start."""
    file = store.state_file(problem.key)
    if file.is_file():
        try:
            return resume(problem, file)
        except UserError:
            file.unlink(missing_ok=True)
    return initialise(problem)


def drive(problem: Problem, state: RunState, store: RunStore) -> None:
    """Run to the end; whatever stops it, the last whole step is on disk."""
    rollback, file = Rollback(), store.state_file(problem.key)
    try:
        run(problem, state, [rollback, NodeProgress(problem)], file)
    except TrainingError:
        raise
    except BaseException:  # ComfyUI's interrupt is no Exception in newer versions
        if rollback.restore(state):
            save(state, file)
            store.prune(keep=file)
        raise
