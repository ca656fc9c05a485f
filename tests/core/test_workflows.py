"""The bundled workflows and blueprints, as far as their files tell."""

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
NODES = set(json.loads((ROOT / "tests/host/schema.json").read_text(encoding="utf-8")))
SCREEN = 1830, 995
"""What of the canvas is seen at 100% on a screen of 1920 x 1080, beside and below the editor's bars."""


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def test_ids_are_those_that_the_front_end_takes() -> None:
    """A UUID each, no two alike: at any other id v0.8.0's front end shows an alert that stays."""
    ids = [read(file)["id"] for file in WORKFLOWS + BLUEPRINTS]
    assert ids and len({uuid.UUID(each) for each in ids}) == len(ids)


def test_every_node_is_in_a_workflow() -> None:
    used = {node["type"] for file in WORKFLOWS for node in read(file)["nodes"]}
    assert used >= NODES


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_words_and_picture(file: Path) -> None:
    """A title, which is the file's name, a description, a note, and a thumbnail of its own."""
    workflow = read(file)
    info = workflow["extra"]["info"]
    assert info["name"] == file.stem and info["description"].endswith(".")
    (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert 80 < len(note["widgets_values"][0]) < 700
    with Image.open(file.with_suffix(".jpg")) as picture:
        assert picture.width >= 500 and picture.height >= 250


def test_thumbnails_differ() -> None:
    """But of one workflow for two families."""
    pictures = {file.name[:2]: file.with_suffix(".jpg").read_bytes() for file in WORKFLOWS}
    assert len(set(pictures.values())) == len(pictures)
    assert {f.stem for f in (ROOT / "workflows").glob("*.jpg")} == {f.stem for f in WORKFLOWS}


def boxes(workflow: dict[str, Any]) -> list[tuple[str, int, int, int, int]]:
    """Title, left, top, right and bottom of each node, with its title bar."""
    return [
        (str(n.get("title", n["type"])), n["pos"][0], n["pos"][1] - 30, n["pos"][0] + n["size"][0],
         n["pos"][1] + n["size"][1])
        for n in workflow["nodes"]
    ]  # fmt: skip


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_tidy(file: Path) -> None:
    """Nothing overlaps, no node crosses a group's frame, and all of it is on one screen."""
    workflow = read(file)
    nodes = boxes(workflow)
    for index, (name, left, top, right, bottom) in enumerate(nodes):
        assert right <= SCREEN[0] and bottom <= SCREEN[1], name
        for other, x, y, far, low in nodes[index + 1 :]:
            apart = right <= x or far <= left or bottom <= y or low <= top
            assert apart, f"{name} overlaps {other}"
        for frame in workflow["groups"]:
            x, y, width, height = frame["bounding"]
            inside = x <= left and y <= top and right <= x + width and bottom <= y + height
            outside = right <= x or x + width <= left or bottom <= y or y + height <= top
            assert inside or outside, f"{name} crosses {frame['title']}"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_loaders_say_where_their_models_are(file: Path) -> None:
    """For the dialog of missing models: name, address and folder, and the name is the one chosen."""
    loaders = {
        "CheckpointLoaderSimple",
        "ControlNetLoader",
        "UpscaleModelLoader",
        "CLIPVisionLoader",
    }
    for node in read(file)["nodes"]:
        if node["type"] in loaders:
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["url"].startswith("https://huggingface.co/") and model["directory"]
