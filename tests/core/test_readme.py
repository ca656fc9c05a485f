"""The library's example in the README is what `help(em_core)` shows, and it runs."""

import os
import re
from pathlib import Path
from textwrap import dedent

import pytest

import em_core
from em_core.demo import model_path
from em_core.demo.scenes import concept_scene, write_scene
from em_core.presets import em_settings

ROOT = Path(__file__).parents[2]


def example(file: str) -> str:
    """The first Python block of a document."""
    found = re.search(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].strip()


def test_the_example_is_the_same_everywhere() -> None:
    assert example("README.md") == example("docs/library.md")
    documented = dedent(em_core.__doc__ or "")
    lines = [line.strip() for line in example("README.md").splitlines()]
    assert all(line in documented for line in lines)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but for the model, the picture and words that the demo model knows."""
    scene = concept_scene(1, "A")
    write_scene(scene, tmp_path)
    text = example("README.md").replace("path/or/hub-id", str(model_path()))
    text = text.replace('"cuda"', '"cpu"').replace("photo.png", "image.png")
    text = text.replace("a photo of <rex:dog> on <shore:beach>", scene.prompt)
    text = text.replace("in the snow", "on snow")
    monkeypatch.setattr(
        "em_core.runs.learning.em_settings",
        lambda family: em_core.EMSettings(steps=2, masks=em_settings(family).masks),
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(text, "README.md", "exec"), names)  # noqa: S102
    assert os.path.getsize("rex.safetensors") > 0
    assert names["pictures"].shape == (1, 3, 64, 64)
    assert set(em_core.ConceptSet.load("rex.safetensors").names) == {"rex", "doll"}
