"""The demo model and one of its scenes, shared by the tests."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_commands import make_world

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
def host() -> Iterator[DiffusersHost]:
    """The demo model that all tests share: what one leaves changed would change others' results."""
    shared = load_host("demo")
    before = {name: weight.detach().clone() for name, weight in weights_of(shared)}
    yield shared
    changed = [name for name, weight in weights_of(shared) if not torch.equal(weight, before[name])]
    assert not changed, f"a test has changed weights of the shared model: {changed}"


def weights_of(host: DiffusersHost) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a model, by their module's and their own name."""
    for part, module in host.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            for name, weight in module.named_parameters():
                yield f"{part}.{name}", weight


@pytest.fixture(scope="session")
def example() -> Example:
    return example_of(concept_scene(1, "B"))


@pytest.fixture
def short(host: DiffusersHost) -> EMSettings:
    """Settings of a run of a few seconds."""
    return replace(em_settings(host.identity().family), steps=12, e_step_every=4, batch=2, seed=3)


@pytest.fixture(scope="session")
def world(host: DiffusersHost, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that quick commands work on."""
    return make_world(tmp_path_factory.mktemp("world"), host)


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is wrong and can be known is said before."""

    def load(*args: object, **more: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(DiffusersHost, "load", load)
