"""How a run may spend memory: number types and recomputation, chosen by what it needs and what is free."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UserError
from ..settings import JointSettings
from .anatomy import Anatomy, Job, Need, Spending
from .visual_memory import needs_of

WHOLE = ("cross_attention", "full")
FP8 = torch.float8_e4m3fn
LOSS_SCALE = 2.0**16


@dataclass(frozen=True)
class Plan:
    """How a run spends memory.

    Attributes:
        name: what it is called where it is chosen.
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
        """What the loss is multiplied by before the backward pass."""
        return loss_scale_for(self.dtype)


def loss_scale_for(dtype: torch.dtype) -> float:
    """Gradients vanish in float16 unless they are scaled."""
    return LOSS_SCALE if dtype == torch.float16 else 1.0


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
            f"Learning whole weights does not fit the memory plan {name!r}, since it needs float32. Expected "
            f"one of {', '.join(plan.name for plan in fit)}, or {AUTO!r}."
        )
    if first.fp8 and not device.fp8:
        first = PLANS[3]
    if device.half is None and first.half and not first.fp8:
        first = PLANS[int(first.recompute)]
    following = fit[fit.index(first) :]
    return tuple(plan for plan in following if can(plan, device))


def can(plan: Plan, device: Device) -> bool:
    """Whether a device can do as a plan says: a CPU, and a card without half precision, compute in
    float32."""
    return device.fp8 if plan.fp8 else device.half is not None or not plan.half


def attempts(
    plans: Sequence[Plan], device: Device, anatomy: Callable[[torch.dtype], Anatomy], job: Job
) -> Iterator[Attempt]:
    """Yield the plans in turn with the batch that is asked for, then, where blocks are recomputed
    already, with smaller ones; fp8 only comes with a batch of 1 after these.

    Args:
        plans: in the order in which they are tried.
        device: what the device can do.
        anatomy: of the model, by the type that its UNet computes in.
        job: the largest step.
    """
    for plan in plans:
        batch = min(job.batch, 1) if plan.fp8 and len(plans) > 1 else job.batch
        while True:
            fewer = replace(job, batch=batch, texts=min(job.texts, batch))
            yield attempt(plan, device, anatomy, fewer)
            if batch == 1 or not plan.recompute:
                break
            batch //= 2


def attempt(
    plan: Plan, device: Device, anatomy: Callable[[torch.dtype], Anatomy], job: Job
) -> Attempt:
    """Return a plan with all that follows from it."""
    dtype = device.half if plan.half and device.half is not None else torch.float32
    storage = FP8 if plan.fp8 else None
    spending = Spending(dtype.itemsize, (storage or dtype).itemsize, plan.recompute)
    return Attempt(plan, dtype, storage, job.batch, needs_of(anatomy(dtype), spending, job))


def first_that_fits(tries: Sequence[Attempt], free: float) -> int:
    """Return the index of the first attempt that free memory suffices for, else of the smallest."""
    fitting = [i for i, one in enumerate(tries) if one.need.device <= free]
    smallest = min(range(len(tries)), key=lambda i: tries[i].need.running)
    return fitting[0] if fitting else smallest


def smaller(tries: Sequence[Attempt], than: Attempt) -> list[Attempt]:
    """Return the attempts after one that need no more memory."""
    after = tries[tries.index(than) + 1 :]
    return [one for one in after if one.need.device <= than.need.device]
