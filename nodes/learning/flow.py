"""Fulfil a request to learn: reuse a finished run, or train within the available memory."""

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch

from ...em_core.errors import OUT_OF_MEMORY, StoreWarning, UserError
from ...em_core.examples import Example
from ...em_core.runs.concept_set import ConceptSet
from ...em_core.runs.digest import Unreadable
from ...em_core.runs.key import run_key
from ...em_core.runs.learning import learn_concepts
from ...em_core.runs.store import RunStore
from ...em_core.settings import EMSettings, JointSettings
from ..host.checkpointing import checkpointing
from ..host.comfy_host import learning_host
from ..host.families import GraphModels
from ..host.identity import models_digest
from .plans import Plan, choose, estimate, preflight, weight_type
from .progress import NodeProgress


@dataclass(frozen=True)
class Request:
    """What LearnConcepts was asked to do."""

    models: GraphModels
    examples: tuple[Example, ...]
    em: EMSettings
    joint: JointSettings
    preset: str


def run_store() -> RunStore:
    """Return the store of the user's finished and interrupted runs."""
    return RunStore(Path(folder_paths.get_user_directory()) / "visual_concepts" / "runs")


def fulfil(request: Request) -> ConceptSet:
    """Return the concepts of a finished run with the same inputs, or learn them.

    Raises:
        UserError: the input is bad, or there is not enough memory.
        TrainingError: a loss is not finite.
    """
    store, plans = run_store(), choose(request.preset, request.joint, request.models.model)
    if request.em.batch > plans[0].batch:
        logging.warning(
            "The memory preset %s allows at most %d samples per step; the batch of %d is reduced to that.",
            plans[0].name, plans[0].batch, request.em.batch,
        )  # fmt: skip
    key = key_or_none(request, plans[0])
    found = None if key is None else store.finished(key, request.examples)
    if found is not None:
        logging.info(
            "Concepts %s were learned before from the same inputs; nothing is trained.",
            ", ".join(found.names),
        )
        return found
    return train_within_memory(request, plans, key, store)


def key_or_none(request: Request, plan: Plan) -> str | None:
    """Return the run's key, or warn and return None if something that acts on it cannot be read."""
    try:
        models = models_digest(request.models, request.examples)
    except Unreadable as error:
        warnings.warn(
            f"This run is not remembered, and if it is interrupted it starts again: a patch on the MODEL, CLIP "
            f"or VAE holds {error}, and whether that has changed cannot be told.",
            StoreWarning,
            stacklevel=2,
        )
        return None
    return run_key(f"{plan.name} {models}", request.examples, request.em, request.joint)


def train_within_memory(
    request: Request, plans: tuple[Plan, ...], key: str | None, store: RunStore
) -> ConceptSet:
    """Train with the first plan and, if memory runs out, continue with the next smaller one.

    Raises:
        UserError: memory runs out with every plan.
    """
    for plan in plans:
        try:
            return train(request, plan, key, store)
        except OUT_OF_MEMORY as error:
            logging.warning("Out of memory with preset %s (%s).", plan.name, error)
        mm.unload_all_models()
        mm.soft_empty_cache()
    raise UserError(
        f"Not enough memory to learn, even with the preset {plans[-1].name}. The model has been unloaded. "
        "Use a smaller resolution or batch, or learn tokens only (set joint to none)."
    )


def train(request: Request, plan: Plan, key: str | None, store: RunStore) -> ConceptSet:
    """Learn on private copies of the weights."""
    models, joint = request.models, request.joint
    dtype = weight_type(plan, models.model)
    # Half precision is too coarse to learn the text encoders' own weights, which only this kind does.
    clip_dtype = torch.float32 if joint.kind == "full" else None
    em = replace(request.em, batch=min(request.em.batch, plan.batch))
    preflight(estimate(models, plan, em), plan, models.model)
    progress = NodeProgress(request.examples[0].picture, em, joint)
    with (
        learning_host(models, dtype, clip_dtype) as host,
        checkpointing(host.unet, plan.checkpointing),
    ):
        return learn_concepts(
            host, request.examples, em, joint, listeners=[progress],
            store=None if key is None else store, key=key,
        )  # fmt: skip
