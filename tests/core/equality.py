"""Equality of whole values: every field of dataclasses, mappings and sequences, tensors bit for bit."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two values differ: the paths of fields and keys, none where they are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if type(a) is not type(b) and not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return [f"{path} ({type(a).__name__}, {type(b).__name__})"]
    if is_dataclass(a):
        names = [f.name for f in fields(a)]
        parts = [differences(getattr(a, n), getattr(b, n), f"{path}.{n}") for n in names]
    elif isinstance(a, Mapping):
        if a.keys() != b.keys():
            return [f"{path} (keys)"]
        parts = [differences(a[n], b[n], f"{path}[{n}]") for n in a]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path} (length)"]
        parts = [differences(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b))]  # noqa: B905
    else:
        return [] if a == b else [path]
    return [where for part in parts for where in part]
