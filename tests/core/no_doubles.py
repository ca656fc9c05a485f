"""A stand-in for a device that has no float64."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DOUBLES = (torch.float64, torch.complex128)
NUMBERS = (torch.ops.aten.scalar_tensor.default,)  # Python's numbers, as in torch.where(a, x, 0.0)


class NoDoubles(TorchDispatchMode):
    """Stands for a device that refuses float64, as MPS does.

    All tensors count as on that device, but for those that `.cpu()` gave and what is made of them.
    """

    def __enter__(self) -> Any:
        self.cpu = torch.Tensor.cpu
        torch.Tensor.cpu = self.moved  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.Tensor.cpu = self.cpu  # type: ignore[method-assign]

    @staticmethod
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.on_cpu = True  # type: ignore[attr-defined]
        return copy

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        out = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(getattr(x, "on_cpu", False) for x in given):
            for x in made:
                x.on_cpu = True  # type: ignore[attr-defined]
        elif function not in NUMBERS and any(x.dtype in DOUBLES for x in made):
            raise TypeError(f"{function} on a device that has no float64")
        return out
