"""A count of the bytes that torch's tensors take on one device, and of their peak."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BLOCK = 512  # what CUDA's caching allocator rounds to


class Bytes(TorchDispatchMode):
    """Counts the storages that live on the meta device while the context is open.

    What is read from it is 1 (or True), so that code that checks a loss runs on.

    Attributes:
        live, peak: bytes now, and at most so far.
        reads: how often something was read, for which a real device would be waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.reads = 0
        self.known: dict[int, weakref.ref] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any) -> None:
            self.live -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, gone)

    def add_module(self, module: nn.Module) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self.add(tensor.data)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.reads += 1
                return True if first.dtype == torch.bool else 1.0
            if func is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "cpu":
                self.reads += 1
                return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        out = func(*(moved(args) if mixed(args) else args), **kwargs)
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self.add(leaf)
        return out


def mixed(args: Any) -> bool:
    """Whether there are tensors with values among others without."""
    found = set()
    for value in args:
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, torch.Tensor):
                found.add(x.is_meta)
    return len(found) == 2


def moved(args: Any) -> Any:
    """The arguments on the meta device, where a real one would have been given them by `.to`; numbers
    stay where they are."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) and x.ndim else x, args)
