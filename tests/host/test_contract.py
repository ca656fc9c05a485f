"""Ids, inputs, order and types are a contract; loading is quick and needs no extra."""

import json
from pathlib import Path

import pytest
from described import SNAPSHOT, contract, ours
from found import ROOT, run_script
from server import Server
from workflow_ui import to_api

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
IDS = {
    "ConceptExample", "LearnConcepts", "ExtractLatentMasks", "RefineCRF", "ApplyConceptTokens",
    "SaveConcepts", "LoadConcepts", "LoadConceptDemoModel", "ConceptDemoScene",
    "CompareConceptMasks", "DiscoverConcepts", "EvaluateConcepts", "ConceptSettings", "ConceptMaskByName",
    "MaskTrainingConditioning", "SaveConceptTrainingSet",
    "LearnVisualCondition", "ApplyVisualCondition", "SaveVisualCondition", "LoadVisualCondition",
}  # fmt: skip


def test_schema_snapshot(server: Server) -> None:
    found = json.loads(json.dumps(contract(ours(server))))
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_node_explains_itself(server: Server) -> None:
    info = ours(server)
    assert set(info) == IDS
    for name, of in info.items():
        assert of["display_name"] and of["description"], name
        for kind in ("required", "optional"):
            for key, spec in of["input"].get(kind, {}).items():
                assert spec[1].get("tooltip"), f"{name}.{key} has no tooltip"


def test_loads_in_under_a_second_without_extras(comfyui: Path) -> None:
    report = json.loads(run_script(comfyui, "load_time.py").splitlines()[-1])
    assert report["heavy"] == [], report
    assert report["seconds"] < 1, report


def test_curves_need_no_matplotlib(comfyui: Path) -> None:
    """They are drawn where it cannot be imported."""
    assert "fine" in run_script(comfyui, "no_matplotlib.py")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_workflow_runs(server: Server, file: Path) -> None:
    """As shipped, but for fewer steps; no missing node, in the template list with a thumbnail."""
    graph = to_api(json.loads(file.read_text(encoding="utf-8")), server.get("/object_info"))
    few = {"class_type": "ConceptSettings", "inputs": {"joint_steps": 3}}
    for node in [*graph.values()]:
        if node["class_type"] == "LearnConcepts":
            graph["few"] = few
            node["inputs"] |= {"steps": 4, "settings": ["few", 0]}
        if node["class_type"] == "LearnVisualCondition":
            node["inputs"] |= {"steps": 2, "em_steps": 2}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    assert server.run(graph)
    assert file.stem in server.get("/workflow_templates")["visual-concepts"]
    assert file.with_suffix(".jpg").is_file()
