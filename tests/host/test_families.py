"""Models of ComfyUI's own classes with real key names, reduced, random weights."""

from pathlib import Path

from found import run_script

CASES = ["sd1-fp32", "sd1-fp16", "sd1-fp8", "sd2v-bf16", "sd2-fp32", "sdxl-fp32"]


def test_families(comfyui: Path) -> None:
    """In one process, since starting ComfyUI takes longer than the checks."""
    said = run_script(comfyui, "families.py", *CASES)
    assert [line for line in said.splitlines() if line.endswith("is fine")] == [
        f"{case} is fine" for case in CASES
    ]
