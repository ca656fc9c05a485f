"""Models of ComfyUI's own classes with real key names, reduced, random weights."""

from pathlib import Path

from found import run_script

CASES = [
    "sd1-fp32-lora",
    "sd1-fp32-cross_attention",
    "sd1-fp32-full",
    "sd1-fp16-lora",
    "sd1-fp8-lora",
    "sd2v-bf16-lora",
    "sd2-fp32-lora",
    "sdxl-fp32-lora",
]


def test_families(comfyui: Path) -> None:
    """In one process, since starting ComfyUI takes longer than the checks."""
    said = run_script(comfyui, "families.py", *CASES)
    assert [line for line in said.splitlines() if line.endswith("is fine")] == [
        f"{case} is fine" for case in CASES
    ]


def test_models_that_cannot_be_learned_on(comfyui: Path) -> None:
    """Inpainting, quantised and other architectures, and parts of different families."""
    assert run_script(comfyui, "refusals.py").splitlines()[-1] == "all are refused"
