"""Fulfil a request to learn: reuse a finished run, or train within the available memory."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
import torch

from ...em_core.errors import MemoryNotice, Notice, StoreWarning
from ...em_core.examples import Example
from ...em_core.model.jobs import Work, job_of, names_in
from ...em_core.model.plans import Attempt, Plan, attempts, choose
from ...em_core.runs.concept_set import ConceptSet
from ...em_core.runs.digest import Unreadable
from ...em_core.runs.key import run_key
from ...em_core.runs.learning import learn_concepts
from ...em_core.runs.store import RunStore
from ...em_core.runs.visual import learn_visual
from ...em_core.runs.visual_condition import VisualCondition
from ...em_core.runs.within_memory import kept_for_now, within_memory
from ...em_core.settings import EMSettings, JointSettings, VisualSettings
from ..host.anatomy import anatomy
from ..host.checkpointing import checkpointing
from ..host.comfy_host import learning_host
from ..host.families import GraphModels
from ..host.identity import models_digest
from .memory import GraphMemory, device_of
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
    def work(self) -> Work:
        """What is learned."""
        return Work(self.examples, self.em, self.joint, self.visual)

    @property
    def kind(self) -> type[Any]:
        """Type of the result."""
        return ConceptSet if self.visual is None else VisualCondition

    @property
    def has_em(self) -> bool:
        """Whether the run begins with the EM loop."""
        known = self.concepts.names if self.concepts else ()
        new = names_in(self.examples) - set(known)
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
    plans = choose(request.memory, request.joint, device_of(request.models.model))
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
    with kept_for_now(store if key is not None else None) as kept:
        return learn(request, plans, key or "unnamed", kept)


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


def learn(request: Request, plans: Sequence[Plan], key: str, store: RunStore) -> Any:
    """Learn with the first plan that fits, and with smaller ones if memory runs out all the same.

    Raises:
        UserError: memory runs out with every plan.
    """
    models, work = request.models, request.work
    body = anatomy(models)
    job = job_of(work, body, models.image_side)
    tries = list(attempts(plans, device_of(models.model), lambda dtype: body, job))
    mm.unload_all_models()
    memory = GraphMemory(models.model)

    def one(attempt: Attempt) -> Any:
        return train(request, attempt, key, store)

    return within_memory(tries, one, memory, work, models.family, say_on_node)


def say_on_node(text: str) -> None:
    """Show on the node what was chosen."""
    warnings.warn(text, MemoryNotice, stacklevel=2)


def train(request: Request, attempt: Attempt, key: str, store: RunStore) -> Any:
    """Learn on private copies of the weights."""
    models, joint = request.models, request.joint
    # Half precision is too coarse to learn the text encoders' own weights, which only this kind does.
    clip_dtype = torch.float32 if joint.kind == "full" else None
    work = request.work.with_batch(attempt.batch)
    em, visual = work.em, work.visual
    progress = NodeProgress(request.examples, em, joint, visual, request.has_em)
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
                host, request.examples, em, joint, request.concepts,
                listeners=[progress], store=store, key=key,
            )  # fmt: skip
