"""From a workflow as ComfyUI's editor saves it to the API format that servers take."""

from typing import Any

from server import Graph

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}


def widgets_of(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """A node's widgets in order, each with whether the editor adds a control after it."""
    found = []
    for kind in ("required", "optional"):
        for name, spec in info["input"].get(kind, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                control = options.get("control_after_generate", name in ("seed", "noise_seed"))
                found.append((name, bool(control)))
    return found


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """The graph that the editor would queue."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: Graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs: dict[str, Any] = {}
        values = iter(node.get("widgets_values") or [])
        for name, control in widgets_of(object_info[node["type"]]):
            inputs[name] = next(values)
            if control:
                next(values)
        assert next(values, None) is None, f"{node['type']} has values too many"
        for socket in node.get("inputs", []):
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
