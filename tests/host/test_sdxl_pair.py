"""diffusers and ComfyUI read prompts of any length alike, and predict alike, on one reduced SDXL.

Also with a LoRA and whole weights that the diffusers host has named.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from found import ROOT, run_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from em_core.hosts.diffusers import DiffusersHost
from em_core.model.adapters import init_lora
from em_core.prompts import ConceptPrompt

sys.path.append(str(ROOT / "tests" / "core"))
from small_models import clip_config, sdxl, sdxl_unet, tokenizers

STARS, TEXT = "star " * 72, " and a red circle on green grass" * 20
CASE = {
    "vectors": {"rex": 3, "doll": 7, "shore": 9},
    "prompts": [
        "a photo of <rex> on grass",
        "<rex>" + TEXT,
        f"{STARS}<doll> on grass beside <rex>",
        f"{STARS}<shore>",
        f"<doll> and <shore>,{TEXT} and <rex>",
        STARS + "star star (star) star",
        "<rex> <doll><shore>" + " star" * 7 + TEXT,
        "",
    ],
}


@pytest.fixture
def found(comfyui: Path, tmp_path: Path) -> tuple[dict[str, Tensor], list[list], dict[str, Tensor]]:
    """What ComfyUI's host gives, what it says of the prompts, and the learned weights."""
    case, learned, out = (tmp_path / name for name in ("case.json", "learned", "out"))
    case.write_text(json.dumps(CASE))
    save_file(weights := some_weights(DiffusersHost(pipeline_of(comfyui))), learned)
    run_script(comfyui, "sdxl_pair.py", case, learned, out)
    with safe_open(out, framework="pt") as file:
        said = json.loads(file.metadata()["plain"])["said"]
    return load_file(out), said, weights


def some_weights(host: DiffusersHost) -> dict[str, Tensor]:
    """A LoRA on all layers, and differences of all weights that can be learned."""
    g = torch.Generator().manual_seed(5)
    lora = {name: p.detach() for name, p in init_lora(host.adaptable_layers(), 2, g).items()}
    up = {
        name: torch.randn(x.shape, generator=g) * 0.2
        for name, x in lora.items()
        if name.endswith("lora_up")
    }
    diffs = {
        f"{name}.diff": torch.randn(p.shape, generator=g) * 0.02
        for name, p in host.weights("full").items()
    }
    return lora | up | diffs


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the module these weights; versions of transformers differ in a part of the names."""
    short = {name.removeprefix("text_model."): x for name, x in weights.items()}
    own = module.state_dict()
    assert {name.removeprefix("text_model.") for name in own} <= short.keys()
    module.load_state_dict({name: short[name.removeprefix("text_model.")] for name in own})


def pipeline_of(comfyui: Path) -> StableDiffusionXLPipeline:
    """A pipeline of the shape of ComfyUI's reduced SDXL, with random weights of its own."""
    unet = sdxl_unet(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4), transformer_layers_per_block=(0, 1, 2),
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=64 + 6 * 256,
    )  # fmt: skip
    return sdxl(
        unet=unet,
        text_encoder=CLIPTextModel(clip_config(32, projection_dim=32)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(64, projection_dim=64)),
        **tokenizers(comfyui / "comfy" / "sd1_tokenizer"),
    )


def host_of(tensors: Mapping[str, Tensor], comfyui: Path) -> DiffusersHost:
    pipeline = pipeline_of(comfyui)
    fill(pipeline.unet, below(tensors, "unet/"))
    fill(pipeline.text_encoder, below(tensors, "clip_l/"))
    fill(pipeline.text_encoder_2, below(tensors, "clip_g/"))
    host = DiffusersHost(pipeline)
    host.factor = 8  # of ComfyUI's reduced VAE; only the picture's size depends on it here
    return host


@torch.no_grad()
def test_same_texts_and_predictions(
    comfyui: Path, found: tuple[dict[str, Tensor], list[list], dict[str, Tensor]]
) -> None:
    """Float32 on both sides, other kernels; ComfyUI's scaling by sigma adds to the prediction's error."""
    tensors, said, learned = found
    host = host_of(tensors, comfyui)
    vectors = {
        name: {encoder: tensors[f"vectors/{name}/{encoder}"] for encoder in ("clip_l", "clip_g")}
        for name in CASE["vectors"]
    }
    prompts = [ConceptPrompt.parse(text) for text in CASE["prompts"]]
    for number, prompt in enumerate(prompts):
        encoded = host.encode_prompts([prompt], vectors)
        stream = encoded.streams["text"]
        columns = {name: list(places) for name, places in stream.columns[0].items()}
        assert [columns, stream.end[0], stream.length] == said[number], str(prompt)
        for name, x in encoded.inputs.items():
            torch.testing.assert_close(x, tensors[f"{number}/{name}"], atol=1e-4, rtol=1e-4)
    encoded = host.encode_prompts(prompts[:2], vectors)
    noise = host.predict(tensors["Z"], tensors["t"], encoded)
    torch.testing.assert_close(noise, tensors["noise"], atol=2e-4, rtol=1e-3)
    for kind in ("lora", "diff"):
        of_kind = {n: x for n, x in learned.items() if (".lora_" in n) == (kind == "lora")}
        with host.applied(of_kind, 0.5):
            changed = host.predict(
                tensors["Z"], tensors["t"], host.encode_prompts(prompts[:2], vectors)
            )
        effect = torch.dist(changed, noise)
        assert torch.dist(changed, tensors[kind]) < 0.01 * effect, kind
