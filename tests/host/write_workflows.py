"""Write the bundled workflows and blueprints anew, after a node or a description has changed.

    python tests/host/write_workflows.py

It starts the newest ComfyUI that the host tests find, or asks one that runs: `--url http://127.0.0.1:8188`.
The descriptions are in tests/host/templates.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from found import FOUND, MISSING, ROOT, python_of
from server import Server
from templates import ALL, BLUEPRINTS, blueprint

WORKFLOWS, SUBGRAPHS = ROOT / "workflows", ROOT / "subgraphs"


def text_of(content: Mapping[str, Any]) -> str:
    """A file's text, by which the tests compare it too."""
    return json.dumps(content, indent=1) + "\n"


def described(info: Mapping[str, Any]) -> dict[Path, str]:
    """Every file of the workflows and blueprints, and what it should hold."""
    sheets = [make(info) for make in ALL]
    files = {WORKFLOWS / f"{sheet.name}.json": text_of(sheet.workflow()) for sheet in sheets}
    for make_one in BLUEPRINTS:
        sheet, shown = make_one(info)
        files[SUBGRAPHS / f"{sheet.name}.json"] = text_of(blueprint(sheet, shown))
    return files


def object_info(url: str | None) -> Any:
    """What a running ComfyUI says of its nodes; starts one without an address."""
    if url:
        with urllib.request.urlopen(f"{url}/object_info", timeout=60) as answer:  # noqa: S310
            return json.loads(answer.read())
    python = python_of(FOUND[0]) if FOUND else None
    if python is None:
        raise SystemExit(MISSING)
    with TemporaryDirectory() as folder:
        server = Server(FOUND[0], python, Path(folder)).start()
        try:
            return server.get("/object_info")
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--url", help="of a ComfyUI that runs")
    files = described(object_info(parser.parse_args().url))
    SUBGRAPHS.mkdir(exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    for path in {*WORKFLOWS.glob("*.json"), *SUBGRAPHS.glob("*.json")} - set(files):
        path.unlink()


if __name__ == "__main__":
    main()
