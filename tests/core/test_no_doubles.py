"""Macs: their device has no float64, so nothing that runs on a device may make any."""

from dataclasses import replace

import pytest
import torch
from no_doubles import DOUBLES, NoDoubles

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


def test_the_stand_in_refuses_float64() -> None:
    with NoDoubles():
        torch.ones(2).mean()
        assert (torch.ones(2).cpu()[:1].double() + 1).mean() == 2
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
