"""Many runs with trouble in between leave the model, the store and the server as they were."""

from pathlib import Path

import pytest
from found import python_of
from soak import soak, wrong


@pytest.mark.slow
def test_soak(comfyui: Path, tmp_path: Path) -> None:
    python = python_of(comfyui)
    assert python is not None
    assert not wrong(soak(comfyui, python, tmp_path, runs=60))
