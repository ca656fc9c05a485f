"""The demo model and one of its scenes, shared by the tests."""

from dataclasses import replace

import pytest
import torch

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.presets import em_settings
from em_core.settings import EMSettings


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two busy threads on two cores slow each other, and results must not depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def host() -> DiffusersHost:
    return load_host("demo")


@pytest.fixture(scope="session")
def example() -> Example:
    return example_of(concept_scene(1, "B"))


@pytest.fixture
def short(host: DiffusersHost) -> EMSettings:
    """Settings of a run of a few seconds."""
    return replace(em_settings(host.identity().family), steps=12, e_step_every=4, batch=2, seed=3)
