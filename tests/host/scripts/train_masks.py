"""MaskTrainingConditioning before core's own Train LoRA, which runs as it is, on a UNet and two DiTs.

What it predicts in a step is taken from the loss function that it calls: inside the mask it has to be
what it is without one, and outside 0. Exits with an error where it is not.
"""

import sys
import warnings
from typing import Any

families = sys.argv[1:]

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.supported_models as known  # noqa: E402
import comfy_extras.nodes_train as core  # noqa: E402
import torch  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

training = part("nodes.training")
SIZE = 16
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 24,
    "context_in_dim": 32, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 3, "depth": 1,
    "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
KINDS = {"flux": (known.Flux, FLUX), "qwen": (known.QwenImage, QWEN)}
seen: list[torch.Tensor] = []


def model_of(family: str, disable_dynamic: bool = False) -> ModelPatcher:
    """A fresh model with the same random weights each time, as core's loaders give it again."""
    if family == "sd1":
        patcher = reduced.unet("sd1")
    else:
        kind, config = KINDS[family]
        prepared = kind(config)
        prepared.set_inference_dtype(torch.float32, None)
        base = prepared.get_model({})
        reduced.randomise(base.diffusion_model, torch.float32, 0)
        place = torch.device("cpu")
        patcher = ModelPatcher(base, load_device=place, offload_device=place)
    patcher.cached_patcher_init = (model_of, (family,))
    return patcher


def data_of(family: str, count: int) -> tuple[dict, list]:
    """Latents and captions of as many pictures."""
    g = torch.Generator().manual_seed(1)
    channels, frame = {"sd1": (4, ()), "flux": (16, ()), "qwen": (16, (1,))}[family]
    latents = {"samples": torch.randn(count, channels, *frame, SIZE, SIZE, generator=g)}
    width = 64 if family == "sd1" else 32
    told = {"pooled_output": torch.randn(1, 24, generator=g), "guidance": 3.5}
    captions = [[torch.randn(1, 77, width, generator=g), dict(told)] for _ in range(count)]
    return latents, captions


def train(family: str, latents: dict, positive: list, steps: int = 1) -> tuple[torch.Tensor, dict]:
    """The predictions of the first step, and the LoRA after all."""
    seen.clear()
    torch.manual_seed(0)
    inputs = {
        "model": model_of(family), "latents": latents, "positive": positive, "batch_size": 1, "steps": steps,
        "grad_accumulation_steps": 1, "learning_rate": 0.1, "rank": 2, "optimizer": "AdamW",
        "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": True,
        "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]", "bucket_mode": False,
        "bypass_mode": False,
    }  # fmt: skip
    names = [i.id for i in core.TrainLoraNode.define_schema().inputs]
    found = core.TrainLoraNode.execute(**{n: [inputs[n]] for n in names}).args
    lora = next(x for x in found if isinstance(x, dict))
    return seen[0], {name: x.clone() for name, x in lora.items()}


def moved(lora: dict) -> float:
    """How far the factors' products are from 0, where they began."""
    ups = [name for name in lora if name.endswith("lora_up.weight")]
    assert ups
    return max(
        float((lora[n].flatten(1) @ lora[n.replace("up", "down")].flatten(1)).abs().max())
        for n in ups
    )


def run(family: str) -> None:
    latents, captions = data_of(family, 1)
    soft = torch.zeros(1, 4 * SIZE, 4 * SIZE)
    soft[:, 8:40, 12:44] = 1.0
    soft[:, 40:44] = 0.3  # cut, though core by itself takes it for inside
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[2:10, 3:11] = True
    plain, lora = train(family, latents, captions)
    assert moved(lora) > 0
    given = training.masked(captions, list(soft), list(latents["samples"]))
    found, lora = train(family, latents, given)
    assert torch.equal(found[..., inside], plain[..., inside]), "inside"
    assert not found[..., ~inside].any() and plain[..., ~inside].any(), "outside"
    assert moved(lora) > 0
    nothing = training.masked(captions, list(torch.zeros_like(soft)), list(latents["samples"]))
    found, lora = train(family, latents, nothing, steps=3)
    assert not found.any() and moved(lora) == 0, "an empty mask learns"
    two_pictures(family)


def two_pictures(family: str) -> None:
    """Each caption has its own picture's mask, in whatever order they are drawn."""
    latents, captions = data_of(family, 2)
    masks = [torch.zeros(SIZE, SIZE) for _ in range(2)]
    masks[0][:, :4], masks[1][:5] = 1.0, 1.0
    train(family, latents, training.masked(captions, masks, list(latents["samples"])), steps=6)
    drawn = [bool((x[..., -1, 0] != 0).any()) for x in seen]  # of the first picture, by a corner
    assert set(drawn) == {True, False}
    for first, x in zip(drawn, seen, strict=True):
        mask = masks[0 if first else 1] > 0
        assert x[..., mask].all() and not x[..., ~mask].any()


def mixed_sizes() -> None:
    """Each mask has its own latent's size, and that core will not keep it so is said."""
    samples = [torch.zeros(4, 16, 16), torch.zeros(4, 8, 12)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        given = training.masked(
            [[torch.zeros(1), {}]], [torch.ones(32, 32), torch.ones(9, 9)], samples
        )
    assert [entry[1]["mask"].shape for entry in given] == [(1, 16, 16), (1, 8, 12)]
    assert any("have 2 sizes" in str(w.message) for w in said)


def watched(*given: Any) -> Any:
    """Core's loss function, which shows what it is called with."""
    loss = make(*given)

    def look(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(prediction.detach().clone())
        return loss(prediction, target)

    return look


make = core._create_loss_function
core._create_loss_function = watched
with torch.inference_mode():
    mixed_sizes()
    for name in families:
        run(name)
        sys.stdout.write(f"{name} is fine\n")
