"""Macs: their device has no float64, so nothing that runs on a device may make any."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_core import (
    CRFSettings,
    DiffusersHost,
    EMSettings,
    Example,
    JointSettings,
    find_masks,
    learn_concepts,
    refine_masks,
)

DOUBLES = (torch.float64, torch.complex128)


class NoDoubles(TorchDispatchMode):
    """Stands for a device that refuses float64, as MPS does."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype in DOUBLES for x in tree_leaves(out)):
            raise TypeError(f"{function} on a device that has no float64")
        return out


def test_the_stand_in_refuses_float64() -> None:
    with NoDoubles():
        torch.ones(2).mean()
        for make in (lambda: torch.ones(2).double(), lambda: torch.tensor([1.0], dtype=DOUBLES[0])):
            with pytest.raises(TypeError, match="no float64"):
                make()


def test_a_run_makes_no_float64(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """From the first masks to the joint phase with prior pictures; finding and refining masks."""
    brief = replace(short, steps=4, e_step_every=2, flip=True, end_of_text_weight=1e-3)
    joint = JointSettings(kind="lora", steps=2, prior_weight=1.0, prior_pictures=1)
    with NoDoubles():
        concepts = learn_concepts(host, [example], brief, joint)
        masks = replace(brief.masks, init_timesteps=2)
        find_masks(host, example.picture, "a photo of <rex> on grass", concepts, masks)
        for settings in (CRFSettings(), CRFSettings(joint=False, working_size=32)):
            refine_masks(example.picture, torch.stack(list(example.truth.values())), settings)
