"""The memory of the device that a MODEL runs on, and what the device can do."""

import gc
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch

from ...em_core.errors import is_out_of_memory
from ...em_core.model.plans import FP8, Device


def device_of(model: Any) -> Device:
    """Return what ComfyUI says of a MODEL's device."""
    device = model.load_device
    if mm.is_device_cpu(device):
        return Device(None, False)
    half = None
    if mm.should_use_bf16(device):
        half = torch.bfloat16
    elif mm.should_use_fp16(device, prioritize_performance=False):
        half = torch.float16
    return Device(half, bool(mm.supports_cast(device, FP8)))


@dataclass(frozen=True)
class GraphMemory:
    """Memory as ComfyUI manages it: see :class:`em_core.runs.within_memory.DeviceMemory`.

    Attributes:
        model: a MODEL, which says on which device.
    """

    model: Any

    def free(self) -> float:
        return float(mm.get_free_memory(self.model.load_device))

    def make_room(self) -> None:
        gc.collect()
        mm.unload_all_models()
        mm.soft_empty_cache()

    def ran_out(self, error: Exception) -> bool:
        known = getattr(mm, "is_oom", None)
        return bool(known and known(error)) or is_out_of_memory(error)
