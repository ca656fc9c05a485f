"""Run inside ComfyUI's Python: makes its modules and this pack importable."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[3]


def start_comfyui() -> None:
    """ComfyUI's modules, as main.py sets them up, without a server."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = os.environ.get("VISUAL_CONCEPTS_DEVICE", "cpu") == "cpu"
    import torch

    torch.set_num_threads(1)


def import_pack() -> ModuleType:
    """The pack under a name like a path, as ComfyUI imports custom nodes."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def part(path: str) -> ModuleType:
    """A module of the pack, such as `nodes.host.comfy_host`."""
    return importlib.import_module(f"{str(ROOT).replace('.', '_x_')}.{path}")
