"""What ComfyUI says of this pack's nodes, as the files of the project hold it."""

import json
from pathlib import Path
from typing import Any

from server import ROOT, Server

SNAPSHOT = Path(__file__).parent / "schema.json"
ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"
FILES = {
    ("LoadConcepts", "name"), ("LoadVisualCondition", "name"), ("EvaluateConcepts", "text_clip"),
    ("EvaluateConcepts", "lpips"),
}  # fmt: skip
"""Inputs whose options are the user's files."""


def ours(server: Server) -> dict[str, Any]:
    """The nodes that this pack registers."""
    info = server.get("/object_info")
    return {
        n: of for n, of in info.items() if "visual-concepts" in str(of.get("python_module", ""))
    }


def inputs(of: dict[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """A node's inputs in order: required or optional, id, and what is said of it."""
    return [
        (kind, key, spec)
        for kind in ("required", "optional")
        for key, spec in of["input"].get(kind, {}).items()
    ]


def contract(info: dict[str, Any]) -> dict[str, Any]:
    """What must not change: the rest (texts, limits) may."""
    return {
        name: {
            "inputs": [
                [kind, key, spec[0] if isinstance(spec[0], str) else "COMBO"]
                for kind, key, spec in inputs(of)
            ],
            "outputs": list(zip(of["output"], of["output_name"], strict=True)),
            "output_node": of["output_node"],
        }
        for name, of in sorted(info.items())
    }


def words(info: dict[str, Any]) -> dict[str, Any]:
    """Every name, tooltip and option, in the form that the front end takes translations in."""
    return {
        name: {
            "display_name": of["display_name"],
            "description": of["description"],
            "inputs": {key: input_words(name, key, spec) for _, key, spec in inputs(of)},
            "outputs": {
                str(number): {"name": said, "tooltip": tooltip}
                for number, (said, tooltip) in enumerate(
                    zip(of["output_name"], of["output_tooltips"], strict=True)
                )
            },
        }
        for name, of in sorted(info.items())
    }


def input_words(node: str, key: str, spec: list[Any]) -> dict[str, Any]:
    """The name, tooltip and options of an input."""
    more = spec[1]
    said = {"name": more.get("display_name") or key, "tooltip": more["tooltip"]}
    options = more.get("options", spec[0] if isinstance(spec[0], list) else [])
    if not options or (node, key) in FILES:
        return said
    return {**said, "options": {str(option): str(option) for option in options}}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
