"""One ordinary LoRA file, a plain trigger word, and core's own nodes: what ApplyConceptTokens gives."""

import json
from pathlib import Path

import pytest
import torch
from found import run_script
from safetensors.torch import load_file
from test_sdxl_pair import pipeline_of
from torch import Tensor

FAMILIES = ["sd1", "sd2", "sdxl"]


@pytest.fixture(scope="module")
def saved(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the script has saved into, and what it said."""
    folder = tmp_path_factory.mktemp("stock")
    return folder, run_script(comfyui, "stock.py", folder, *FAMILIES).splitlines()


def test_one_lora_file(saved: tuple[Path, list[str]]) -> None:
    """Strengths, clip skip, two files, another LoRA below, the model-only loader, float16 tables."""
    fine = [line for line in saved[1] if line.endswith("is fine")]
    assert fine == [f"{family} is fine" for family in FAMILIES]


def added(layer: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """What factors up and down add to a weight, flattened."""
    return layer.flatten(1) @ other.flatten(1) * alpha / other.shape[0]


@pytest.mark.parametrize("name", ["two_lora", "full_lora"])
def test_diffusers_loads_what_was_learned_on_sdxl_here(
    comfyui: Path, saved: tuple[Path, list[str]], name: str
) -> None:
    """Every layer under its name in the checkpoint, also kernels; each adds what the file says."""
    folder = saved[0] / "loras"
    pipeline = pipeline_of(comfyui)
    pipeline.load_lora_weights(str(folder), weight_name=f"{name}.safetensors")
    file = load_file(folder / f"{name}.safetensors")
    own = json.loads((saved[0] / "sdxl.json").read_text())
    parts = {"lora_te1_": pipeline.text_encoder, "lora_te2_": pipeline.text_encoder_2}
    layers = {f"lora_unet_{own[f'{n}.weight'].removesuffix('.weight').replace('.', '_')}": m
              for n, m in pipeline.unet.named_modules() if f"{n}.weight" in own and adapted(m)}  # fmt: skip
    for prefix, encoder in parts.items():
        for path, module in encoder.named_modules():
            if adapted(module):
                short = path.removeprefix("text_model.").replace(".", "_")
                layers[f"{prefix}text_model_{short}"] = module
    assert set(layers) == {key.partition(".")[0] for key in file}
    for key, module in layers.items():
        up, down, alpha = (
            file[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        delta = module.get_delta_weight("default_0")
        torch.testing.assert_close(delta.flatten(1), added(up, down, alpha), atol=1e-6, rtol=1e-5)


def adapted(module: torch.nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


def test_files_of_other_programs_become_concepts(comfyui: Path, tmp_path: Path) -> None:
    """LoRAs of three formats as core loads them, embeddings; what is none of these is refused."""
    said = run_script(comfyui, "imports.py", tmp_path).splitlines()
    assert [line for line in said if "is fine" in line] == ["sd1 is fine", "sdxl is fine"]
