"""Memory presets: number type, checkpointing and batch for what the graphics card has."""

import logging
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch

from ...em_core.errors import UserError
from ...em_core.settings import EMSettings, JointSettings, WeightKind
from ..host.families import GraphModels

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """How a run spends memory.

    Attributes:
        name: as the node calls it.
        half: bfloat16 weights where the device has them, else float32.
        checkpointing: recompute activations in the backward pass.
        batch: most noise samples per step.
        kinds: joint phases that fit.
    """

    name: str
    half: bool
    checkpointing: bool
    batch: int
    kinds: tuple[WeightKind, ...]


PLANS = (
    Plan("24 GB", False, False, 8, ("none", "lora", "cross_attention", "full")),
    Plan("12 GB", True, False, 4, ("none", "lora")),
    Plan("8 GB", True, True, 1, ("none", "lora")),
)
CHOICES = ["auto", *(plan.name for plan in PLANS)]
ACTIVATIONS = 4.0
CHECKPOINTED = 1.5


def choose(name: str, joint: JointSettings, model: Any) -> tuple[Plan, ...]:
    """The plan to try, and the next smaller one to fall back on.

    Raises:
        UserError: the joint phase does not fit the preset.
    """
    index = CHOICES.index(name) - 1 if name != "auto" else fitting(model)
    if joint.kind not in PLANS[index].kinds:
        if name != "auto":
            raise UserError(
                f"The joint phase {joint.kind!r} does not fit the preset {name}. "
                f"Choose one of {', '.join(PLANS[index].kinds)}, or the preset 24 GB."
            )
        index = 0
    return tuple(plan for plan in PLANS[index : index + 2] if joint.kind in plan.kinds)


def fitting(model: Any) -> int:
    """Index of the largest plan for the device's memory; a CPU gets the first."""
    device = model.load_device
    if mm.is_device_cpu(device):
        return 0
    total = mm.get_total_memory(device) / GIB
    return 0 if total > 20 else 1 if total > 10 else 2


def weight_type(plan: Plan, model: Any) -> torch.dtype:
    """float32, or bfloat16 where the plan wants it and the device computes in it.

    Never float16: without loss scaling its gradients vanish.
    """
    half = plan.half and not mm.is_device_cpu(model.load_device)
    return torch.bfloat16 if half and mm.should_use_bf16(model.load_device) else torch.float32


def estimate(models: GraphModels, plan: Plan, em: EMSettings) -> float:
    """About how many bytes a run takes on the device: weights, and activations with gradients."""
    size = weight_type(plan, models.model).itemsize
    weights = size * sum(p.numel() for p in models.model.model.parameters())
    weights += sum(p.numel() * p.element_size() for p in models.clip.patcher.model.parameters())
    side = (em.image_side or models.image_side) // models.factor
    latent = [min(em.batch, plan.batch), models.channels, side, side]
    forward = models.model.model.memory_required(latent)
    return weights + forward * (CHECKPOINTED if plan.checkpointing else ACTIVATIONS)


def preflight(bytes_needed: float, plan: Plan, model: Any) -> None:
    """Say what a run will take, and warn where the device has less."""
    needed = bytes_needed / GIB
    logging.info("Learning concepts with preset %s: about %.1f GB needed.", plan.name, needed)
    if mm.is_device_cpu(model.load_device):
        return
    total = mm.get_total_memory(model.load_device) / GIB
    if needed > total:
        logging.warning("This device has %.1f GB; a smaller preset may be needed.", total)
