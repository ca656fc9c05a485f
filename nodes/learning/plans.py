"""How a run may spend memory: number types and recomputation, chosen by what it needs and what is free."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management as mm
import torch

from ...em_core.errors import UserError
from ...em_core.examples import Example, fitted_size
from ...em_core.model.anatomy import Anatomy, Job, Need, Sight, Spending
from ...em_core.model.visual_memory import needs_of
from ...em_core.settings import EMSettings, JointSettings, VisualSettings
from ..host.families import GraphModels

WHOLE = ("cross_attention", "full")
FP8 = torch.float8_e4m3fn
LOSS_SCALE = 2.0**16
LETTERS = 300  # about as many as 75 pieces of the vocabulary have


@dataclass(frozen=True)
class Plan:
    """How a run spends memory.

    Attributes:
        name: what the node calls it.
        half: whether the UNet computes in half precision where the device does; a CPU does not.
        fp8: whether the UNet's matrices rest in fp8 and are cast layer by layer.
        recompute: whether blocks are computed again in the backward pass.
    """

    name: str
    half: bool = False
    fp8: bool = False
    recompute: bool = False


PLANS = (
    Plan("float32"),
    Plan("float32, recomputing", recompute=True),
    Plan("half", half=True),
    Plan("half, recomputing", half=True, recompute=True),
    Plan("fp8, recomputing", half=True, fp8=True, recompute=True),
)
AUTO = "automatic"
CHOICES = [AUTO, *(plan.name for plan in PLANS)]


@dataclass(frozen=True)
class Device:
    """What a device can do.

    Attributes:
        half: the half-precision type that it computes in, or None.
        fp8: whether it casts from fp8.
    """

    half: torch.dtype | None
    fp8: bool

    @classmethod
    def of(cls, model: Any) -> "Device":
        """What ComfyUI says of a MODEL's device."""
        device = model.load_device
        if mm.is_device_cpu(device):
            return cls(None, False)
        half = None
        if mm.should_use_bf16(device):
            half = torch.bfloat16
        elif mm.should_use_fp16(device, prioritize_performance=False):
            half = torch.float16
        return cls(half, bool(mm.supports_cast(device, FP8)))


@dataclass(frozen=True)
class Attempt:
    """A plan with all that follows from it on one device.

    Attributes:
        plan: the plan.
        dtype: in which the UNet computes.
        storage: in which its matrices rest, or None for the same.
        batch: noise samples of a step.
        need: bytes that the run takes.
    """

    plan: Plan
    dtype: torch.dtype
    storage: torch.dtype | None
    batch: int
    need: Need

    @property
    def loss_scale(self) -> float:
        """Gradients vanish in float16 unless they are scaled."""
        return LOSS_SCALE if self.dtype == torch.float16 else 1.0


def choose(name: str, joint: JointSettings, device: Device) -> tuple[Plan, ...]:
    """Return the plan of this name, or the best one for "automatic", and all smaller ones after it.

    Whole weights are learned in float32. Tokens and LoRAs are float32 anyway, so that the frozen UNet
    is in half precision wherever the device computes in it.

    Raises:
        UserError: the joint phase does not go with the plan.
    """
    whole = joint.kind in WHOLE
    fit = [plan for plan in PLANS if not (whole and plan.half)]
    if name == AUTO:
        first = PLANS[0] if whole or device.half is None else PLANS[2]
    else:
        first = PLANS[CHOICES.index(name) - 1]
    if first not in fit:
        raise UserError(
            f"The joint phase {joint.kind!r} does not fit the memory plan {name!r}: it learns whole "
            f"weights, in float32. Expected one of {', '.join(plan.name for plan in fit)}, or {AUTO!r}."
        )
    if device.half is None and first.half and not first.fp8:
        first = PLANS[int(first.recompute)]
    following = fit[fit.index(first) :]
    return tuple(plan for plan in following if can(plan, device))


def can(plan: Plan, device: Device) -> bool:
    """Whether a device can do as a plan says: a CPU, and a card without half precision, compute in
    float32."""
    return device.fp8 if plan.fp8 else device.half is not None or not plan.half


def attempts(
    plans: tuple[Plan, ...], device: Device, anatomy: Anatomy, job: Job
) -> Iterator[Attempt]:
    """Yield the plans in turn with the batch that is asked for, then, where blocks are recomputed
    already, with smaller ones; fp8 only comes with a batch of 1 after these."""
    for plan in plans:
        batch = min(job.batch, 1) if plan.fp8 and len(plans) > 1 else job.batch
        while True:
            fewer = replace(job, batch=batch, texts=min(job.texts, batch))
            yield attempt(plan, device, anatomy, fewer)
            if batch == 1 or not plan.recompute:
                break
            batch //= 2


def attempt(plan: Plan, device: Device, anatomy: Anatomy, job: Job) -> Attempt:
    """Return a plan with all that follows from it."""
    dtype = device.half if plan.half and device.half is not None else torch.float32
    storage = FP8 if plan.fp8 else None
    spending = Spending(dtype.itemsize, (storage or dtype).itemsize, plan.recompute)
    return Attempt(plan, dtype, storage, job.batch, needs_of(anatomy, spending, job))


def job_of(
    models: GraphModels,
    anatomy: Anatomy,
    examples: tuple[Example, ...],
    em: EMSettings,
    joint: JointSettings,
) -> Job:
    """Return the largest step of a run: that of its largest picture."""
    side = em.image_side or models.image_side
    multiple = models.factor * 2 ** max(stage.level for stage in anatomy.stages)
    pictures = [example.picture for example in examples]
    sizes = [fitted_size(p.shape[-2], p.shape[-1], side, multiple) for p in pictures]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    return Job(
        height=height // models.factor,
        width=width // models.factor,
        kind=joint.kind,
        batch=em.batch,
        texts=em.batch if em.draws_subsets else 1,
        chunks=1 + max(len(str(example.prompt)) for example in examples) // LETTERS,
        concepts=max(len(example.prompt.names) for example in examples),
        rank=joint.rank,
        masks=em.mode != "none" and em.has_attention_terms,
    )


def visual_job(job: Job, anatomy: Anatomy, visual: VisualSettings, concepts: int) -> Job:
    """Return the largest step of a run that learns a visual condition."""
    tokens = visual.token_learning_rate is not None
    sight = Sight(concepts, tokens, tokens and visual.reference_gradient)
    return replace(job, batch=visual.batch, texts=min(job.texts, visual.batch), sight=sight)


def first_that_fits(tries: list[Attempt], free: float) -> int:
    """Return the index of the first attempt that free memory suffices for, else of the smallest."""
    fitting = [i for i, one in enumerate(tries) if one.need.device <= free]
    smallest = min(range(len(tries)), key=lambda i: tries[i].need.running)
    return fitting[0] if fitting else smallest


def smaller(tries: list[Attempt], than: Attempt) -> list[Attempt]:
    """Return the attempts after one that need no more memory."""
    after = tries[tries.index(than) + 1 :]
    return [one for one in after if one.need.device <= than.need.device]
