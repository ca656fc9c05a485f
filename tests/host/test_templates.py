"""The bundled workflows: written from their descriptions, valid for a running ComfyUI, and run.

Those for checkpoints run on the demo model in the loaders' place (templates/stand_ins.py); everything else is
as in the file.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from found import ROOT
from safetensors.torch import save_file
from server import Graph, Server
from templates.stand_ins import on_demo, shortened
from workflow_ui import to_api
from write_workflows import described

FILES = sorted((ROOT / "workflows").glob("*.json"))
NEEDED = re.compile(r"v(\d+)\.(\d+)\.\d+ and newer")
QUICK = ("01", "09", "10", "13", "18")
"""Numbers of the workflows that run with every call of the tests; the others are marked slow."""


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def api(server: Server, number: str) -> Graph:
    """The first workflow of that number, as the editor would queue it."""
    file = next(each for each in FILES if each.name.startswith(number))
    return to_api(read(file), server.get("/object_info"))


def skip_older(server: Server, file: Path) -> None:
    """Skip a workflow whose title says that it needs a newer ComfyUI."""
    needed = NEEDED.search(file.stem)
    has = server.get("/system_stats")["system"]["comfyui_version"].lstrip("v").split(".")
    if needed and tuple(map(int, has[:2])) < tuple(map(int, needed.groups())):
        pytest.skip(f"needs ComfyUI {needed[0]}")


def models_of(file: Path) -> list[dict[str, str]]:
    """What the loaders in a workflow say of the files that they want."""
    return [m for node in read(file)["nodes"] for m in node["properties"].get("models", [])]


@pytest.fixture(scope="session")
def models(server: Server) -> Iterator[Server]:
    """A server with an empty file for every model that a workflow names, and a random upscaler that loads."""
    wanted = {(m["directory"], m["name"]) for file in FILES for m in models_of(file)}
    made = [server.base / "models" / folder / name for folder, name in wanted]
    for path in made:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in made:
        if path.parent.name == "upscale_models":
            save_file(upscaler(), path)
    (server.base / "input" / "example.png").write_bytes((ROOT / "docs" / "demo.png").read_bytes())
    yield server
    for path in made:
        path.unlink()


@pytest.fixture(scope="session")
def saved(models: Server) -> Server:
    """A server on which what the other workflows load has been learned and saved."""
    models.run(on_demo(api(models, "09")))
    condition = on_demo(api(models, "20"))
    models.run({n: of for n, of in condition.items() if of["class_type"] != "SaveImage"})
    return models


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


def test_files_are_what_their_descriptions_make(server: Server) -> None:
    """After a change of a node or a description: `python tests/host/write_workflows.py`."""
    info = server.get("/object_info")
    if "SAM3_Detect" not in info:
        pytest.skip("described for the newest ComfyUI")
    wanted = described(info)
    assert {p for p in wanted if p.read_text(encoding="utf-8") != wanted[p]} == set()
    assert {p for p in wanted if p.parent.name == "workflows"} == set(FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_valid(saved: Server, file: Path) -> None:
    """Every node, link, widget and file name is accepted as it stands in the file."""
    skip_older(saved, file)
    said = saved.post("/prompt", {"prompt": to_api(read(file), saved.get("/object_info"))})
    saved.post("/queue", {"clear": True})
    saved.post("/interrupt", {})
    assert said["node_errors"] == {}
    assert file.stem in saved.get("/workflow_templates")["visual-concepts"]
    saved.wait(said["prompt_id"]) if running(saved) else None


def running(server: Server) -> bool:
    return bool(server.get("/queue")["queue_running"])


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if f.name[:2] in QUICK else pytest.mark.slow) for f in FILES],
    ids=lambda f: f.stem,
)
def test_runs(saved: Server, file: Path) -> None:
    """To the end with few steps, and what it saves or shows is there."""
    skip_older(saved, file)
    graph = to_api(read(file), saved.get("/object_info"))
    has_demo = any(of["class_type"] == "ConceptDemoScene" for of in graph.values())
    shown = saved.run(shortened(graph) if has_demo else on_demo(graph))
    for node in graph:
        if graph[node]["class_type"] in ("SaveImage", "PreviewImage", "MaskPreview"):
            assert shown[node]["images"], graph[node]
        if graph[node]["class_type"] == "PreviewAny":
            assert "".join(shown[node]["text"]).strip(), graph[node]
