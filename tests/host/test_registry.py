"""What the registry is told of the pack, as ComfyUI's own parser reads it, and what it shows."""

import json
from pathlib import Path

from found import ROOT, run_script
from PIL import Image

NEEDED = (
    "__init__.py",
    "pyproject.toml",
    "LICENSE",
    "nodes",
    "em_core",
    "web",
    "locales",
    "workflows",
    "subgraphs",
)


def test_metadata(comfyui: Path) -> None:
    """One classifier that the parser does not know would void the whole list."""
    found = json.loads(run_script(comfyui, "registry.py").splitlines()[-1])
    project, comfy = found["project"], found["tool_comfy"]
    assert project["name"] == "visual-concepts" and len(project["version"].split(".")) == 3
    assert project["supported_os"] == ["OS Independent"]
    assert project["supported_comfyui_version"] == ">=0.8.0"
    urls = project["urls"]
    assert all(urls[key] for key in ("homepage", "documentation", "repository", "issues"))
    assert comfy["publisher_id"] and comfy["display_name"] == "Visual Concepts"
    assert comfy["icon"].startswith("https://") and comfy["icon"].endswith("docs/brand/icon.png")


def test_pictures() -> None:
    """The registry wants a square icon of at most 400 pixels, and a banner of 21:9."""
    with Image.open(ROOT / "docs/brand/icon.png") as icon:
        assert icon.width == icon.height <= 400
    with Image.open(ROOT / "docs/brand/banner.png") as banner:
        assert banner.width * 9 == banner.height * 21
    assert all(file.stat().st_size < 50_000 for file in (ROOT / "docs/brand").glob("*.png"))


def test_archive() -> None:
    """What the archive leaves out is there, and is nothing that the pack runs with."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    assert all((ROOT / path).exists() for path in left_out)
    assert not {path.partition("/")[0] for path in left_out if "/" not in path} & set(NEEDED)
    assert all(Path(path).suffix != ".py" for path in left_out)
