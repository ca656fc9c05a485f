"""Every test here runs in each ComfyUI that is found."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "scripts")]
from found import FOUND, MISSING, python_of  # noqa: E402
from server import Server  # noqa: E402


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for `comfyui` runs on each version found."""
    if "comfyui" in metafunc.fixturenames:
        here = FOUND or [pytest.param(None, marks=pytest.mark.skip(reason=MISSING))]
        metafunc.parametrize(
            "comfyui", here, ids=lambda f: f.name if f else "none", scope="session"
        )


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server of each version."""
    python = python_of(comfyui)
    assert python is not None
    running = Server(comfyui, python, tmp_path_factory.mktemp(f"server_{comfyui.name}")).start()
    yield running
    running.stop()
