"""Fulfil a request to learn: reuse a finished run, or train within the available memory."""

import gc
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch

from ...em_core.errors import MemoryNotice, Notice, StoreWarning, UserError, is_out_of_memory
from ...em_core.examples import Example
from ...em_core.model.memory import FAMILIES, KINDS, describe
from ...em_core.runs.concept_set import ConceptSet
from ...em_core.runs.digest import Unreadable
from ...em_core.runs.key import run_key
from ...em_core.runs.learning import learn_concepts
from ...em_core.runs.store import RunStore
from ...em_core.runs.visual import learn_visual
from ...em_core.runs.visual_condition import VisualCondition
from ...em_core.settings import EMSettings, JointSettings, VisualSettings
from ..host.anatomy import anatomy
from ..host.checkpointing import checkpointing
from ..host.comfy_host import learning_host
from ..host.families import GraphModels
from ..host.identity import models_digest
from .plans import (
    Attempt,
    Device,
    attempts,
    choose,
    first_that_fits,
    job_of,
    smaller,
    visual_job,
)
from .progress import NodeProgress


@dataclass(frozen=True)
class Request:
    """What LearnConcepts or LearnVisualCondition was asked to do.

    Attributes:
        models: of the graph.
        examples: to learn from.
        em, joint: settings of the EM loop and of the joint phase.
        memory: name of a memory plan, or "automatic".
        visual: settings of the visual phase, if a condition is to be learned.
        concepts: learned concepts that it starts from.
    """

    models: GraphModels
    examples: tuple[Example, ...]
    em: EMSettings
    joint: JointSettings
    memory: str
    visual: VisualSettings | None = None
    concepts: ConceptSet | None = None

    @property
    def kind(self) -> type[Any]:
        """Type of the result."""
        return ConceptSet if self.visual is None else VisualCondition

    @property
    def has_em(self) -> bool:
        """Whether the run begins with the EM loop."""
        known = self.concepts.names if self.concepts else ()
        new = concepts_in(self.examples) - set(known)
        return self.visual is None or (self.visual.after_em and bool(new))


def run_store() -> RunStore:
    """Return the store of the user's finished and interrupted runs."""
    return RunStore(Path(folder_paths.get_user_directory()) / "visual_concepts" / "runs")


def fulfil(request: Request) -> Any:
    """Return the concepts, or the visual condition, of a finished run with the same inputs, or learn them.

    A run's key has the plan that was asked for, not the one that was free memory's choice.

    Raises:
        UserError: the input is bad, or there is not enough memory.
        TrainingError: a loss is not finite.
    """
    device = Device.of(request.models.model)
    plans = choose(request.memory, request.joint, device)
    store, key = run_store(), key_or_none(request)
    found = None if key is None else store.finished(key, request.examples, request.kind)
    if found is not None:
        names = ", ".join(found.names)
        warnings.warn(
            f"Found again: {names}. The same inputs were learned before, so nothing is trained.",
            Notice,
            stacklevel=2,
        )
        return found
    body = anatomy(request.models)
    job = job_of(request.models, body, request.examples, request.em, request.joint)
    if request.visual is not None:
        job = visual_job(job, body, request.visual, len(concepts_in(request.examples)))
    tries = list(attempts(plans, device, body, job))
    if key is not None:
        return train_within_memory(request, tries, key, store)
    # Not remembered; but where memory runs out, the next attempt goes on from the last step.
    with TemporaryDirectory() as folder:
        return train_within_memory(request, tries, "unnamed", RunStore(folder))


def key_or_none(request: Request) -> str | None:
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
    settings = request.em, request.joint, request.visual
    return run_key(f"{request.memory} {models}", request.examples, *settings, request.concepts)


def concepts_in(examples: Sequence[Example]) -> set[str]:
    """Return the names of all concepts that the examples mark."""
    return {name for example in examples for name in example.prompt.names}


def train_within_memory(request: Request, tries: list[Attempt], key: str, store: RunStore) -> Any:
    """Train with the first attempt that fits what is free and, if memory runs out all the same, go on
    from the last step with the next smaller one.

    Raises:
        UserError: memory runs out with every attempt.
    """
    mm.unload_all_models()
    left = tries[first_that_fits(tries, free_memory(request)) :]
    while left:
        attempt = left[0]
        announce(request, attempt)
        try:
            return train(request, attempt, key, store)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            logging.warning("Out of memory with the plan %s (%s).", attempt.plan.name, error)
        # Outside the handler, since the error holds the frames that hold the tensors.
        make_room()
        left = smaller(left, attempt)
    raise UserError(
        f"Not enough memory to learn, even with the plan {attempt.plan.name} and {attempt.batch} sample "
        "per step. The model has been unloaded. Use a smaller resolution, close other programs that use "
        "the graphics card, or learn tokens only (set 'also train' to nothing)."
    )


def ran_out_of_memory(error: Exception) -> bool:
    """Whether ComfyUI or torch takes an error for exhausted memory."""
    known = getattr(mm, "is_oom", None)
    return bool(known and known(error)) or is_out_of_memory(error)


def make_room() -> None:
    """Free all that is not in use."""
    gc.collect()
    mm.unload_all_models()
    mm.soft_empty_cache()


def free_memory(request: Request) -> float:
    """Return how many bytes are free where the MODEL runs."""
    return float(mm.get_free_memory(request.models.model.load_device))


def announce(request: Request, attempt: Attempt) -> None:
    """Say on the node what was chosen, what it needs, and what else follows from it."""
    free, need = free_memory(request), attempt.need.device
    learned = KINDS[request.joint.kind] if request.visual is None else "visual condition"
    what = f"{FAMILIES.get(request.models.family, 'model')}, {learned}"
    text = f"{describe(what, need, free)} (memory plan {attempt.plan.name})."
    wanted = request.em.batch if request.visual is None else request.visual.batch
    if attempt.batch < wanted:
        text += f" Samples per step: {attempt.batch} instead of {wanted}."
    if need > free:
        text += " This may not suffice; a smaller resolution needs less."
    warnings.warn(text, MemoryNotice, stacklevel=2)


def train(request: Request, attempt: Attempt, key: str, store: RunStore) -> Any:
    """Learn on private copies of the weights."""
    models, joint = request.models, request.joint
    # Half precision is too coarse to learn the text encoders' own weights, which only this kind does.
    clip_dtype = torch.float32 if joint.kind == "full" else None
    em, visual = request.em, request.visual
    if visual is None:
        em = replace(em, batch=attempt.batch)
    else:
        em = replace(em, batch=min(em.batch, attempt.batch))
        visual = replace(visual, batch=min(visual.batch, attempt.batch))
    progress = NodeProgress(request.examples[0].picture, em, joint, visual, request.has_em)
    with learning_host(models, attempt.dtype, clip_dtype, attempt.storage) as host:
        host.loss_scale, host.passes_at_once = attempt.loss_scale, attempt.need.passes
        host.memory_required = attempt.need.trained + attempt.need.step
        with checkpointing(host.unet, attempt.plan.recompute):
            if visual is not None:
                return learn_visual(
                    host, request.examples, em, visual, request.concepts,
                    listeners=[progress], store=store, key=key,
                )  # fmt: skip
            return learn_concepts(
                host, request.examples, em, joint, listeners=[progress], store=store, key=key
            )
