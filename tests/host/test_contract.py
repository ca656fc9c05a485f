"""Ids, inputs, order and types are a contract; loading is quick and needs no extra."""

import json
from pathlib import Path

from described import SNAPSHOT, contract, ours
from found import run_script
from server import Server

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
