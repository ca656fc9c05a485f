"""Finding ComfyUI, and running scripts in its Python."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
ON_CARD = os.environ.get("VISUAL_CONCEPTS_DEVICE", "cpu") != "cpu"
"""Whether ComfyUI is to choose its device by itself, as on a machine with a graphics card."""


def find_comfyui() -> list[Path]:
    """Folders of ComfyUI: $COMFYUI_PATH (several with ':'), above the pack, or comfy-cli's usual place."""
    named = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    usual = Path.home() / "comfy"
    guesses = named or [ROOT.parents[1], usual / "ComfyUI", *sorted(usual.glob("ComfyUI-*"))]
    return [folder for folder in guesses if (folder / "comfy" / "sd.py").is_file()]


def python_of(folder: Path) -> Path | None:
    """The Python that ComfyUI runs with: $COMFYUI_PYTHON, its own environment, or the newest's."""
    named = os.environ.get("COMFYUI_PYTHON")
    tries = [Path(named)] if named else []
    tries += [f / ".venv" / "bin" / "python" for f in (folder, *find_comfyui())]
    return next((p for p in tries if p.is_file()), None)


def front_end_of(folder: Path) -> list[str]:
    """What starts a ComfyUI with its own front end, where $COMFYUI_FRONTENDS has it.

    That folder has one of `comfyui-frontend-package` for each version, by ComfyUI's folder name, as
    `pip install --target $COMFYUI_FRONTENDS/ComfyUI-0.8.0 comfyui-frontend-package==1.35.9` makes it.
    """
    own = Path(os.environ.get("COMFYUI_FRONTENDS", ""), folder.name, "comfyui_frontend_package")
    static = own / "static"
    return ["--front-end-root", str(static)] if (static / "index.html").is_file() else []


FOUND = [folder for folder in find_comfyui() if python_of(folder)]
MISSING = (
    "No ComfyUI found (with a Python environment in its .venv). Set COMFYUI_PATH, and COMFYUI_PYTHON "
    "where its Python is elsewhere, to run these tests; CONTRIBUTING.md says how."
)


def run_script(comfyui: Path, script: str, *args: object, timeout: int = 300) -> str:
    """Run a script in ComfyUI's Python; its output, or a failure that shows it."""
    environment = os.environ | {
        "COMFYUI_PATH": str(comfyui),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPTS),
    }
    command: Sequence[str] = [str(python_of(comfyui)), str(SCRIPTS / script), *map(str, args)]
    done = subprocess.run(
        command, env=environment, cwd=comfyui, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
