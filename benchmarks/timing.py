"""The time of an action where it runs, and what that place is called."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """CPU time of an action, or the time until a card has done it."""
    if device.type == "cpu":
        began = time.process_time()
        action()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def place_of(device: torch.device) -> str:
    """The device, for people."""
    on_card = device.type == "cuda"
    return torch.cuda.get_device_name(device) if on_card else "one thread of a CPU"
