"""Models of ComfyUI's own classes with real key names, reduced, random weights."""

from pathlib import Path

import pytest
from found import run_script

CASES = [
    ("sd1", "fp32"),
    ("sd1", "fp16"),
    ("sd1", "fp8"),
    ("sd2v", "bf16"),
    ("sd2", "fp32"),
    ("sdxl", "fp32"),
]


@pytest.mark.parametrize(("family", "weights"), CASES, ids=["-".join(case) for case in CASES])
def test_family(comfyui: Path, family: str, weights: str) -> None:
    assert "fine" in run_script(comfyui, "families.py", family, weights)
