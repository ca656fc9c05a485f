"""The bundled workflows: written from their descriptions, valid for a running ComfyUI, and run.

Those for checkpoints run on the demo model in the loaders' place (templates/stand_ins.py); everything else is
as in the file.
"""

from pathlib import Path

import pytest
from server import Server
from shipped import FILES, read, skip_older
from templates.stand_ins import on_demo, shortened
from workflow_ui import to_api
from write_workflows import described

QUICK = ("01", "09", "10", "13", "18")
"""Numbers of the workflows that run with every call of the tests; the others are marked slow."""


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
    shown = saved.run(shortened(graph) if has_demo else on_demo(graph, seed=FILES.index(file)))
    for node in graph:
        if graph[node]["class_type"] in ("SaveImage", "PreviewImage", "MaskPreview"):
            assert shown[node]["images"], graph[node]
        if graph[node]["class_type"] == "PreviewAny":
            assert "".join(shown[node]["text"]).strip(), graph[node]
