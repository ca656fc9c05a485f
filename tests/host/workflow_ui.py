"""From a workflow as ComfyUI's editor saves it to the API format that servers take."""

from typing import Any

from server import Graph
from templates.editor import inputs_of
from templates.sizes import has_control, is_widget

NOTES = {"Note", "MarkdownNote"}


def widgets_of(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """A node's widgets in order, each with whether the editor adds a control after it."""
    specs = inputs_of(info).items()
    return [(name, has_control(name, spec)) for name, spec in specs if is_widget(spec)]


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
