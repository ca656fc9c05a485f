"""Workflows through the real Load Checkpoint, on files of random weights that it knows the family of.

What ComfyUI fixes for a family is whole in them: the text encoders with all words, and a UNet of the width of
text and model that the family is known by (`scripts/write_checkpoint.py`). Prompts, names and links are as
the workflows' files have them. Random weights see no things in a picture, so Discover Concepts rightly refuses
them: workflow 16 has the demo model alone (`test_templates.py`).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from found import run_script
from numpy.typing import NDArray
from PIL import Image
from server import Graph, Server
from shipped import FILES, read
from templates.stand_ins import shortened
from workflow_ui import to_api

FAMILIES = {"sd1": "SD 1.5", "sdxl": "SDXL"}
SIDE = 128
PROMPT = "a photo of {} on a beach"


@pytest.fixture(params=FAMILIES)
def loaded(
    server: Server, comfyui: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Server, str]]:
    """A server with a checkpoint of a family, and the family."""
    file = server.base / "models" / "checkpoints" / f"random_{request.param}.safetensors"
    run_script(comfyui, "write_checkpoint.py", request.param, file, "small", timeout=900)
    Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 100).save(
        server.base / "input" / "example.png"
    )
    yield server, request.param
    server.forget()
    file.unlink()


def graph(server: Server, number: str, family: str) -> Graph:
    """A family's workflow as the editor would queue it, but for steps, sizes and the checkpoint's name."""
    end = f"({FAMILIES[family]}).json"
    file = next(f for f in FILES if f.name.startswith(number) and f.name.endswith(end))
    made = shortened(to_api(read(file), server.get("/object_info")))
    for node in made.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = f"random_{family}.safetensors"
        if node["class_type"] in ("EmptyLatentImage", "ImageScale"):
            inputs |= {"width": SIDE, "height": SIDE}
        if node["class_type"] == "ConceptSettings":
            inputs["resolution"] = str(SIDE)
        if node["class_type"] == "ExtractLatentMasks":
            inputs["passes"] = 2
    return made


def drawn(server: Server, made: Graph, text: str = "") -> NDArray[np.float32]:
    """The picture that a graph saves, of another text if one is given."""
    encode = next(of for of in made.values() if of["inputs"].get("text"))
    encode["inputs"]["text"] = text or encode["inputs"]["text"]
    shown = server.run(made, timeout=1800)
    (image,) = (out["images"][0] for out in shown.values() if "images" in out)
    with Image.open(server.base / image["type"] / image["filename"]) as picture:
        return np.asarray(picture, dtype=np.float32)


@pytest.mark.slow
def test_what_is_learned_and_saved_acts_alike_in_stock_nodes(loaded: tuple[Server, str]) -> None:
    """09 learns and saves; 10 draws with its concepts, and 18 the same with its LoRA and a plain word."""
    server, family = loaded
    server.run(graph(server, "09", family), timeout=1800)
    here = drawn(server, graph(server, "10", family), PROMPT.format("<rex>"))
    stock = drawn(server, graph(server, "18", family), PROMPT.format("sks"))
    words = drawn(server, graph(server, "10", family), PROMPT.format("dog"))
    assert np.abs(here - stock).mean() < 0.1 * np.abs(here - words).mean()
