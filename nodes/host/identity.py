"""A digest of a graph's models and of all that acts on them; it identifies the model in a run's key."""

import hashlib
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .families import GraphModels

SAMPLES = 64
DEPTH = 12


class Digest:
    """A hash over whatever patches consist of: tensors by samples, functions by code and closure."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, Any] = {}  # keeps visited objects alive, so that no id is reused

    def text(self, text: str) -> None:
        self.hash.update(text.encode() + b"\0")

    def tensor(self, tensor: Tensor) -> None:
        """Add a tensor's type, its shape and evenly spaced samples of its values."""
        self.text(f"{tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            chosen = flat[:: max(1, flat.numel() // SAMPLES)]
            self.hash.update(chosen.to(torch.float32).cpu().numpy().tobytes())

    def add(self, value: Any, depth: int = 0) -> None:
        """Add a value and everything it holds."""
        if value is None or isinstance(value, (str, int, float, complex, bytes, torch.dtype)):
            return self.text(repr(value))
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if id(value) in self.seen or depth > DEPTH:
            return self.text("again")
        self.seen[id(value)] = value
        self.text(type(value).__qualname__)
        for part in parts_of(value):
            self.add(part, depth + 1)


def parts_of(value: Any) -> list[Any]:
    """Return what a container, function or object holds."""
    if isinstance(value, Mapping):
        return [part for key, item in value.items() for part in (repr(key), item)]
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not is_empty(cell)]
        return [value.__module__, value.__qualname__, value.__code__, value.__defaults__, *cells]
    if isinstance(value, CodeType):
        return [value.co_code, *value.co_names]
    if isinstance(value, nn.Module):
        return [part for name, weight in value.state_dict().items() for part in (name, weight)]
    if isinstance(value, type):
        return [value.__module__]
    return (
        [part for name, item in sorted(vars(value).items()) for part in (name, item)]
        if hasattr(value, "__dict__")
        else []
    )


def is_empty(cell: Any) -> bool:
    try:
        return cell.cell_contents is None
    except ValueError:
        return True


def patcher_digest(patcher: Any) -> str:
    """Return a digest of a model and of every patch on it; it is the same after a restart."""
    digest = Digest()
    for name, weight in sorted(patcher.model.named_parameters()):
        digest.text(name)
        original = patcher.backup.get(name)
        digest.tensor(weight if original is None else original.weight)
    for key, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        digest.text(str(key))
        digest.add([patch[:4] for patch in patches])
    options = {
        name: value for name, value in patcher.model_options.items() if name != "multigpu_clones"
    }
    digest.add(options)
    for part in (patcher.object_patches, patcher.wrappers, patcher.injections):
        digest.add(part)
    return digest.hash.hexdigest()


def models_digest(models: GraphModels) -> str:
    """Return a digest of MODEL, CLIP and VAE with all that acts on them."""
    patchers = (models.model, models.clip.patcher, models.vae.patcher)
    parts = [*map(patcher_digest, patchers), str(models.clip.layer_idx)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
