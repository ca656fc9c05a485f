"""A model of diffusers that is loaded as a memory plan says, which is chosen by what is free."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, is_out_of_memory
from ..examples import Example
from ..model.jobs import Work, job_of
from ..model.plans import AUTO, CHOICES, FP8, Attempt, Device, attempts, choose
from ..presets import em_settings, visual_settings
from ..runs.concept_set import ConceptSet
from ..runs.key import model_digest, run_key
from ..runs.learning import learn_concepts
from ..runs.runner import Listener
from ..runs.store import RunStore
from ..runs.visual import learn_visual
from ..runs.visual_condition import VisualCondition
from ..runs.within_memory import Result, kept_for_now, within_memory
from ..settings import EMSettings, JointSettings, VisualSettings
from .anatomy import anatomy
from .diffusers import DiffusersHost
from .loading import has_bfloat16, torch_device


def device_of(device: torch.device) -> Device:
    """Return what a device of torch's can do."""
    if device.type == "cpu":
        return Device(None, False)
    half = torch.bfloat16 if has_bfloat16(device) else torch.float16
    try:
        torch.zeros(1, device=device).to(FP8).to(half)
    except (RuntimeError, TypeError):
        return Device(half, False)
    return Device(half, True)


@dataclass(frozen=True)
class TorchMemory:
    """Memory as torch manages it: see :class:`em_core.runs.within_memory.DeviceMemory`."""

    device: torch.device

    def free(self) -> float:
        """Return how many bytes are free, with what torch's allocator holds without using it."""
        device, of_kind = self.device, getattr(torch, self.device.type, None)
        if device.type == "mps":
            return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        if of_kind is None or not hasattr(of_kind, "mem_get_info"):
            return available()
        held = of_kind.memory_reserved(device) - of_kind.memory_allocated(device)
        return float(of_kind.mem_get_info(device)[0] + held)

    def make_room(self) -> None:
        gc.collect()
        of_kind: Any = getattr(torch, self.device.type, None)
        if hasattr(of_kind, "empty_cache"):
            of_kind.empty_cache()

    def ran_out(self, error: Exception) -> bool:
        return is_out_of_memory(error)


def available() -> float:
    """Return how many bytes of the computer's own memory are free.

    Raises:
        UserError: psutil is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise UserError(
            "Memory plans need psutil, to see what is free. Install it: pip install psutil"
        ) from error
    return float(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Fitting:
    """What an attempt learns with.

    Attributes:
        host: the model on its device.
        work: what is learned, with as many noise samples in a step as fit.
    """

    host: DiffusersHost
    work: Work


class PlannedModel:
    """A model that each run loads as the first memory plan says that fits what is free.

    Attributes:
        source: the folder, file or name that it is loaded from.
        device: where it learns.
        plan: name of a memory plan, see :data:`em_core.model.plans.CHOICES`.
        identity: of the model.
        memory: of the device.
    """

    def __init__(
        self,
        source: Path | str,
        device: torch.device | str = "cpu",
        plan: str = AUTO,
        say: Callable[[str], None] = logging.info,
    ) -> None:
        """Read the model into the computer's own memory.

        Args:
            source: as of :meth:`DiffusersHost.load`.
            device: where it learns.
            plan: "automatic" takes the fastest plan that fits what is free on the device, any other name the
                plan of that name; if memory runs out all the same, the next smaller one goes on.
            say: is told what was chosen and what it needs.

        Raises:
            UserError: there is no such plan, model or device, or diffusers is not installed.
        """
        if plan not in CHOICES:
            raise UserError(f"No memory plan {plan!r}. Expected one of {', '.join(CHOICES)}.")
        self.source, self.device, self.plan = source, torch_device(str(device)), plan
        self.memory, self.say = TorchMemory(self.device), say
        self.ability = device_of(self.device)
        self._read: DiffusersHost | None = None
        self._digests: dict[torch.dtype, str] = {}
        host = self.at_rest(self.first_type(JointSettings()))
        self.identity, self.image_side = host.identity(), host.image_side
        kinds = (torch.float32, self.ability.half or torch.float32)
        self.anatomies = {dtype: anatomy(host, dtype) for dtype in kinds}

    def at_rest(self, dtype: torch.dtype) -> DiffusersHost:
        """Return a host over the model on the CPU, read anew if it is not there in this type."""
        if self._read is None or self._read.dtype != dtype:
            self._read = None
            self._read = DiffusersHost.load(self.source, "cpu", dtype)
        return self._read

    def first_type(self, joint: JointSettings) -> torch.dtype:
        """Return the type that the largest plan of a run computes in, whatever is free."""
        half = self.ability.half
        return half if choose(self.plan, joint, self.ability)[0].half and half else torch.float32

    def digest(self, joint: JointSettings) -> str:
        """Return a digest of the model and of the plan that was asked for, which may not be the one
        that is chosen."""
        dtype = self.first_type(joint)
        if dtype not in self._digests:
            self._digests[dtype] = model_digest(self.at_rest(dtype))
        return f"{self.plan} {self._digests[dtype]}"

    def host(self, attempt: Attempt) -> DiffusersHost:
        """Return the model on its device, as an attempt says."""
        dtype, recompute, storage = attempt.dtype, attempt.plan.recompute, attempt.storage
        # What rests on the CPU leaves it, and must be gone from the device once the attempt is over.
        at_rest = self.at_rest(dtype) if storage is None else None
        self._read = None
        if at_rest is not None:
            known = at_rest.known_words
            host = DiffusersHost(at_rest.pipeline, self.device, known, dtype, recompute)
        else:
            host = DiffusersHost.load(self.source, self.device, dtype, recompute, storage)
        host.loss_scale, host.passes_at_once = attempt.loss_scale, attempt.need.passes
        return host

    def carry_out(self, work: Work, learn: Callable[[Fitting], Result]) -> Result:
        """Learn with the first plan that fits, and with smaller ones if memory runs out all the same.

        Args:
            work: what is learned.
            learn: learns with what it is given; it goes on from the last step that was saved.

        Raises:
            UserError: memory runs out with every plan, or the plan does not go with what is learned.
        """
        plans = choose(self.plan, work.joint, self.ability)
        job = job_of(work, self.anatomies[torch.float32], self.image_side)
        tries = list(attempts(plans, self.ability, self.anatomies.__getitem__, job))

        def one(attempt: Attempt) -> Result:
            return learn(Fitting(self.host(attempt), work.with_batch(attempt.batch)))

        return within_memory(tries, one, self.memory, work, self.identity.family, self.say)

    def carry_out_kept(
        self,
        work: Work,
        learn: Callable[[Fitting, RunStore, str], Result],
        concepts: ConceptSet | None,
        store: RunStore | None,
    ) -> Result:
        """Carry out a run whose state is kept in a store, or as long as it lasts; `learn` is given its key too."""
        settled = work.em, work.joint, work.visual
        key = run_key(self.digest(work.joint), work.examples, *settled, concepts)
        with kept_for_now(store) as kept:
            return self.carry_out(work, lambda fitting: learn(fitting, kept, key))

    def learn_concepts(
        self,
        examples: Sequence[Example],
        settings: EMSettings | None = None,
        joint: JointSettings | None = None,
        concepts: ConceptSet | None = None,
        *,
        listeners: Sequence[Listener] = (),
        store: RunStore | None = None,
    ) -> ConceptSet:
        """Learn concepts; see :func:`em_core.learn_concepts`."""
        work = Work(
            examples, settings or em_settings(self.identity.family), joint or JointSettings()
        )

        def learn(fitting: Fitting, kept: RunStore, key: str) -> ConceptSet:
            em, joint = fitting.work.em, fitting.work.joint
            return learn_concepts(
                fitting.host, examples, em, joint, concepts,
                listeners=listeners, store=kept, key=key,
            )  # fmt: skip

        return self.carry_out_kept(work, learn, concepts, store)

    def learn_visual(
        self,
        examples: Sequence[Example],
        settings: EMSettings | None = None,
        visual: VisualSettings | None = None,
        concepts: ConceptSet | None = None,
        *,
        listeners: Sequence[Listener] = (),
        store: RunStore | None = None,
    ) -> VisualCondition:
        """Learn a visual condition; see :func:`em_core.learn_visual`."""
        family = self.identity.family
        work = Work(
            examples,
            settings or em_settings(family),
            JointSettings(),
            visual or visual_settings(family),
        )

        def learn(fitting: Fitting, kept: RunStore, key: str) -> VisualCondition:
            em, visual = fitting.work.em, fitting.work.visual
            return learn_visual(
                fitting.host, examples, em, visual, concepts,
                listeners=listeners, store=kept, key=key,
            )  # fmt: skip

        return self.carry_out_kept(work, learn, concepts, store)
