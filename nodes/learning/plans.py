"""Memory presets: number type, checkpointing and batch size by the memory of the graphics card."""

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
        name: the preset's name in the node.
        half: whether weights are bfloat16, if the device supports it; otherwise they are float32.
        checkpointing: whether activations are recomputed in the backward pass.
        batch: the largest number of noise samples per step.
        kinds: the joint phases that fit.
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
    """Return the plan to try and the next smaller one to fall back on.

    Raises:
        UserError: the joint phase does not fit the preset.
    """
    index = CHOICES.index(name) - 1 if name != "auto" else fitting(model)
    if joint.kind not in PLANS[index].kinds:
        if name != "auto":
            raise UserError(
                f"The joint phase {joint.kind!r} does not fit the memory preset {name}. Expected one of "
                f"{', '.join(PLANS[index].kinds)}. Choose one of these, or the preset 24 GB."
            )
        index = 0
    return tuple(plan for plan in PLANS[index : index + 2] if joint.kind in plan.kinds)


def fitting(model: Any) -> int:
    """Return the index of the largest plan that fits the device's memory; a CPU gets the first."""
    device = model.load_device
    if mm.is_device_cpu(device):
        return 0
    total = mm.get_total_memory(device) / GIB
    return 0 if total > 20 else 1 if total > 10 else 2


def weight_type(plan: Plan, model: Any) -> torch.dtype:
    """Return bfloat16 if the plan asks for it and the device computes in it, otherwise float32.

    float16 is never used, because its gradients vanish without loss scaling.
    """
    half = plan.half and not mm.is_device_cpu(model.load_device)
    return torch.bfloat16 if half and mm.should_use_bf16(model.load_device) else torch.float32


def estimate(models: GraphModels, plan: Plan, em: EMSettings) -> float:
    """Estimate how many bytes a run takes on the device, for weights and for activations with gradients."""
    size = weight_type(plan, models.model).itemsize
    weights = size * sum(weight.numel() for weight in models.model.model.parameters())
    weights += sum(
        weight.numel() * weight.element_size() for weight in models.clip.patcher.model.parameters()
    )
    side = (em.image_side or models.image_side) // models.factor
    latent = [min(em.batch, plan.batch), models.channels, side, side]
    forward = models.model.model.memory_required(latent)
    return weights + forward * (CHECKPOINTED if plan.checkpointing else ACTIVATIONS)


def preflight(bytes_needed: float, plan: Plan, model: Any) -> None:
    """Log how much memory a run will take, and warn if the device has less."""
    needed = bytes_needed / GIB
    logging.info("Learning concepts with preset %s: about %.1f GB needed.", plan.name, needed)
    if mm.is_device_cpu(model.load_device):
        return
    total = mm.get_total_memory(model.load_device) / GIB
    if needed > total:
        logging.warning(
            "This device has only %.1f GB; a smaller memory preset may be needed.", total
        )
