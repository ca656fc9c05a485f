"""The bundled workflows' files, and the models that they want."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from server import ROOT, Graph, Server
from workflow_ui import to_api

FILES = sorted((ROOT / "workflows").glob("*.json"))
NEEDED = re.compile(r"v(\d+)\.(\d+)\.\d+\)")


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def api(server: Server, number: str) -> Graph:
    """The first workflow of that number, as the editor would queue it."""
    file = next(each for each in FILES if each.name.startswith(number))
    return to_api(read(file), server.get("/object_info"))


def is_new_enough(server: Server, wanted: tuple[int, ...]) -> bool:
    """Whether a server is of a version, such as (0, 33), or newer."""
    has = server.get("/system_stats")["system"]["comfyui_version"].lstrip("v").split(".")
    return tuple(map(int, has[:2])) >= wanted


def skip_older(server: Server, file: Path) -> None:
    """Skip a workflow whose title says that it needs a newer ComfyUI."""
    needed = NEEDED.search(file.stem)
    if needed and not is_new_enough(server, tuple(map(int, needed.groups()))):
        pytest.skip(f"needs ComfyUI {needed[0][:-1]} or newer")


def models_of(file: Path) -> list[dict[str, str]]:
    """What the loaders in a workflow say of the files that they want."""
    return [m for node in read(file)["nodes"] for m in node["properties"].get("models", [])]


def upscaler(width: int = 4, growth: int = 32) -> dict[str, torch.Tensor]:
    """Random weights of a Real-ESRGAN (x4) with one block, under the names of the published files."""
    generator = torch.Generator().manual_seed(0)
    inside = [(growth, width + n * growth) for n in range(4)] + [(width, width + 4 * growth)]
    layers = {
        f"body.0.rdb{block}.conv{n}": sizes
        for block in (1, 2, 3)
        for n, sizes in enumerate(inside, start=1)
    }
    layers |= {"conv_first": (width, 3), "conv_last": (3, width)}
    layers |= dict.fromkeys(("conv_body", "conv_up1", "conv_up2", "conv_hr"), (width, width))
    weights = {
        f"{name}.weight": 0.1 * torch.randn(*sizes, 3, 3, generator=generator)
        for name, sizes in layers.items()
    }
    return weights | {f"{name}.bias": torch.zeros(sizes[0]) for name, sizes in layers.items()}
