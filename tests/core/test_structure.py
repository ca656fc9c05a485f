"""The one rule of imports: em_core knows nothing of ComfyUI, and only what it needs at start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "em_core").rglob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution", "server"}


def imported(file: Path) -> set[str]:
    """Top-level names of all absolute imports in a file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_core_imports_nothing_of_the_host(file: Path) -> None:
    assert not imported(file) & HOST


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_plain_ascii(file: Path) -> None:
    assert file.read_text(encoding="utf-8").isascii()


def test_the_loop_needs_no_extra() -> None:
    """The EM loop, its files and the CRF load without diffusers, transformers or matplotlib."""
    code = (
        "import sys, em_core.runs.runner, em_core.runs.concept_set, em_core.method.joint, em_core.presets; "
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'pydensecrf'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
