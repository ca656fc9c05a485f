"""Core's own LoRA training under our masks, and what is said of settings under which they fail."""

from pathlib import Path

import numpy as np
import pytest
from found import run_script
from graphs import learning
from PIL import Image
from server import Builder, Failed, Node, Server
from test_marks import told

# v0.8.0 itself cannot train these on the CPU: a norm's weights, and a kernel, have no gradient there.
FAMILIES = {"ComfyUI-0.8.0": ["sd1"]}


def test_a_masked_loss_in_cores_training(comfyui: Path) -> None:
    """Inside the mask as without one, outside nothing, and an empty mask learns nothing."""
    families = FAMILIES.get(comfyui.name, ["sd1", "flux", "qwen"])
    said = run_script(comfyui, "train_masks.py", *families).splitlines()
    assert [line for line in said if "fine" in line] == [f"{name} is fine" for name in families]


def prepared(b: Builder, count: int) -> tuple[Node, Node, Node]:
    """The demo model, latents of so many pictures, and their masks: two, of what the scene shows."""
    model, scene = b.add("LoadConceptDemoModel"), b.add("ConceptDemoScene", seed=3, kind="A")
    latent = b.add("VAEEncode", pixels=scene, vae=model[2])
    return model, b.add("RepeatLatentBatch", samples=latent, amount=count), scene


def test_a_graph_that_trains(comfyui: Path, server: Server) -> None:
    """Through the whole of ComfyUI, with a caption for two pictures, and nothing to complain of."""
    b = Builder()
    model, latents, scene = prepared(b, 2)
    caption = b.add("CLIPTextEncode", clip=model[1], text="a photo of a star on grass")
    given = {"conditioning": caption, "masks": scene[2], "latents": latents}
    masked = b.add("MaskTrainingConditioning", **given)
    trained = b.add(
        "TrainLoraNode", model=model, latents=latents, positive=masked, batch_size=1, steps=2,
        grad_accumulation_steps=1, learning_rate=0.01, rank=2, optimizer="AdamW", loss_function="MSE",
        seed=0, training_dtype="fp32", lora_dtype="fp32", quantized_backward=False, algorithm="LoRA",
        gradient_checkpointing=True, checkpoint_depth=1, offloading=False, existing_lora="[None]",
        bucket_mode=False, bypass_mode=False,
    )  # fmt: skip
    lora = 1 if comfyui.name == "ComfyUI-0.8.0" else 0
    b.add("TestDump", value=trained[lora], name="trained")
    assert masked.id not in told(comfyui, server, b)
    assert any("lora" in name for name in server.dumped("trained"))


def test_wrong_settings_and_masks_are_said(comfyui: Path, server: Server) -> None:
    b = Builder()
    model, latents, _ = prepared(b, 1)
    caption = b.add("CLIPTextEncode", clip=model[1], text="a photo of a star on grass")
    full, hole = (b.add("SolidMask", value=v, width=n, height=n) for v, n in ((1.0, 64), (0.0, 40)))
    mask = b.add("MaskComposite", destination=full, source=hole, x=12, y=12, operation="multiply")
    given = {"conditioning": caption, "latents": latents}
    masked = b.add("MaskTrainingConditioning", masks=mask, **given)
    b.add("TestDump", value=masked, name="masked")
    wrong = {
        "positive": [masked.id, 0],
        "batch_size": 2,
        "bucket_mode": True,
        "training_dtype": "none",
    }
    b.graph["900"] = {"class_type": "TrainLoraNode", "inputs": wrong}
    said = told(comfyui, server, b)[masked.id]
    for words in (
        "batch_size is 2", "training_dtype is 'none'", "bucket_mode is on", "Mask 1 covers the border",
    ):  # fmt: skip
        assert words in said
    assert server.dumped("masked")["x/0/1/mask"].shape == (1, 16, 16)
    both = b.add("RepeatLatentBatch", samples=latents, amount=2)
    b.graph[masked.id]["inputs"]["latents"] = [both.id, 0]
    with pytest.raises(Failed, match="Expected 2 masks, one for each latent"):
        server.run(b.graph)


def test_core_reads_our_training_sets(comfyui: Path, tmp_path: Path) -> None:
    assert run_script(comfyui, "training_set.py", tmp_path).splitlines()[-1] == "fine"


def test_a_training_set_of_what_was_learned(server: Server) -> None:
    """Its masks are those that were found, at the picture's size."""
    p = learning(steps=4)
    given = {"examples": p.examples, "concepts": p.learn, "layout": "OneTrainer", "name": "found"}
    options = {"overwrite": True, "words": "", "apart": True, "crop": False, "paint_out": False}
    p.b.graph[p.examples.id]["inputs"].pop("masks")
    p.b.add("SaveConceptTrainingSet", **given, **options)
    p.b.add("TestDump", value=p.learn[1], name="masks")
    server.run(p.b.graph)
    folder = server.base / "output" / "training_sets" / "found"
    masks = server.dumped("masks")["x"]
    for mask, name in zip(masks, ("0001-rex", "0002-doll"), strict=True):
        pixels = np.asarray(Image.open(folder / f"{name}-masklabel.png"))
        assert (pixels[..., 0] == mask.numpy() * 255).all() and mask.any()
        assert (folder / f"{name}.txt").read_text() == f"a photo of {name[5:]}"
