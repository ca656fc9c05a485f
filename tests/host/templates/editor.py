"""Workflows as ComfyUI's editor saves them, from a readable description.

A `Sheet` takes nodes by type, with their widgets and links by name, and their arrangement. What it does not
name has its default of a running ComfyUI's /object_info, so a changed node needs a new run, not new positions.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from templates.boxes import Box, frames
from templates.sizes import HEAD, WIDTHS, has_control, is_widget, least_height, note_height

PACK = "visual-concepts"
SPACE = uuid.UUID("7c1f6f4e-3a35-5f0c-9a43-0f6f0f4b7a11")
"""The namespace of the ids, which stay the same for a name."""
NOTE = {"color": "#222", "bgcolor": "#000"}
INLETS, OUTLETS = -10, -20
"""The ids that a blueprint's own sockets have inside it."""
LEFT, TOP = 90, 100
"""Where the upper left corner lies on the screen: beside and below the editor's bars."""


@dataclass
class Out:
    """An output of a node."""

    node: Placed
    slot: int


@dataclass
class Placed:
    """A node: what it is, its inputs by name, and where it lies."""

    id: int
    type: str
    title: str
    width: int
    height: int
    specs: dict[str, list[Any]]
    outputs: list[tuple[str, str]]
    values: dict[str, Any]
    links: dict[str, Out]
    extra: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    x: int = 0
    y: int = 0

    def size(self) -> tuple[int, int]:
        return self.width, self.height + HEAD

    def place(self, x: int, y: int) -> None:
        self.x, self.y = x, y + HEAD

    def __getitem__(self, name: str) -> Out:
        """Its output of that name."""
        return Out(self, [label for label, _ in self.outputs].index(name))


class Sheet:
    """A workflow in the making."""

    def __init__(self, info: Mapping[str, Any], name: str, description: str) -> None:
        self.info, self.name, self.description = info, name, description
        self.nodes: list[Placed] = []
        self.layout: Box | None = None
        self.inlets = Placed(INLETS, "", "", 120, 40, {}, [], {}, {})
        self.outlets: list[tuple[str, Out]] = []

    def note(self, text: str, width: int = 300, height: int = 0) -> Placed:
        """A note of this text in Markdown."""
        lines = text.strip()
        node = Placed(
            len(self.nodes) + 1, "MarkdownNote", "How to use this", width,
            height or note_height(lines, width), {}, [], {"": lines}, {}, dict(NOTE),
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def add(
        self,
        node: str,
        /,
        *,
        title: str = "",
        width: int = 0,
        height: int = 0,
        models: tuple[dict[str, str], ...] = (),
        widgets: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> Placed:
        """A node; an input is a value, a node (its first output) or an output.

        `__` in an input's name stands for a dot; `widgets` has inputs whose names mean something else here.

        Raises:
            KeyError: the node has no such input.
        """
        of, kind = self.info[node], node
        specs = inputs_of(of)
        named = {
            name.replace("__", "."): value for name, value in {**inputs, **(widgets or {})}.items()
        }
        links = {
            name: Out(value, 0) if isinstance(value, Placed) else value
            for name, value in named.items()
            if isinstance(value, (Placed, Out))
        }
        values = {name: value for name, value in named.items() if name not in links}
        for name in named:
            if name.split(".")[0] not in specs or (name in values and not is_widget(specs[name])):
                raise KeyError(f"{kind} has no input {name}")
        outputs = list(zip(of["output_name"], of["output"], strict=True))
        placed = Placed(
            len(self.nodes) + 1, kind, title, width or WIDTHS.get(kind, 260), 0, specs, outputs,
            values, links,
        )  # fmt: skip
        if models:
            placed.properties["models"] = list(models)
        growing = any(spec[0] == "COMFY_AUTOGROW_V3" for spec in specs.values())
        sockets = len(sockets_of(placed)) + growing
        ours = PACK in str(of.get("python_module", ""))
        placed.height = height or least_height(kind, specs, sockets, len(outputs), ours)
        self.nodes.append(placed)
        return placed

    def inlet(self, name: str, kind: str) -> Out:
        """An input of a blueprint, as something to link from inside it."""
        self.inlets.outputs.append((name, kind))
        return self.inlets[name]

    def outlet(self, name: str, out: Out) -> None:
        """An output of a blueprint."""
        self.outlets.append((name, out))

    def arrange(self, box: Box) -> None:
        """Put the nodes where the box has them."""
        box.place(0, 0)
        self.layout = box

    def workflow(self) -> dict[str, Any]:
        """The file's content.

        Raises:
            ValueError: a node has no place.
        """
        if self.layout is None:
            raise ValueError(f"{self.name} is not arranged.")
        links = self.links()
        return {
            "id": str(uuid.uuid5(SPACE, self.name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [node_json(node, links, self.info) for node in self.nodes],
            "links": links,
            "groups": groups_json(self.layout),
            "config": {},
            "extra": {
                "ds": {"scale": 1, "offset": [LEFT, TOP]},
                "info": {"name": self.name, "description": self.description},
            },
            "version": 0.4,
        }

    def links(self) -> list[list[Any]]:
        """Every link: id, from node and output, to node and socket, type."""
        found: list[list[Any]] = []
        for node in self.nodes:
            for slot, (name, _) in enumerate(sockets_of(node)):
                if name in node.links:
                    out = node.links[name]
                    ends = [out.node.id, out.slot, node.id, slot]
                    found.append([len(found) + 1, *ends, kind_of(out)])
        for slot, (_, out) in enumerate(self.outlets):
            found.append([len(found) + 1, out.node.id, out.slot, OUTLETS, slot, kind_of(out)])
        return found


def kind_of(out: Out) -> str:
    """The type of what an output gives."""
    return out.node.outputs[out.slot][1]


def inputs_of(of: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A node's inputs in order, required before optional."""
    return {
        name: spec
        for kind in ("required", "optional")
        for name, spec in of["input"].get(kind, {}).items()
    }


def sockets_of(node: Placed) -> list[tuple[str, str]]:
    """Name and type of each socket: inputs that are no widgets, and widgets that are linked."""
    found = []
    for name, spec in node.specs.items():
        grown = [linked for linked in node.links if linked.startswith(f"{name}.")]
        if grown:
            found += [(linked, kind_of(node.links[linked])) for linked in grown]
        elif name in node.links or not is_widget(spec):
            found.append((name, spec[0] if isinstance(spec[0], str) else "COMBO"))
    return found


def node_json(node: Placed, links: list[list[Any]], info: Mapping[str, Any]) -> dict[str, Any]:
    """A node as the editor saves it."""
    ours = PACK in str(info.get(node.type, {}).get("python_module", ""))
    properties = dict(node.properties)
    if node.type != "MarkdownNote":
        properties |= {
            "Node name for S&R": node.type,
            "cnr_id": PACK if ours else "comfy-core",
        }
    optional = info.get(node.type, {}).get("input", {}).get("optional", {})
    inputs = []
    for slot, (name, kind) in enumerate(sockets_of(node)):
        one = {"name": name, "type": kind, "link": link_into(links, node.id, slot)}
        if name in node.specs and is_widget(node.specs[name]):
            one["widget"] = {"name": name}
        if name in optional:
            one["shape"] = 7
        inputs.append(one)
    outputs = [
        {"name": name, "type": kind, "links": links_from(links, node.id, slot), "slot_index": slot}
        for slot, (name, kind) in enumerate(node.outputs)
    ]
    written = {
        "id": node.id, "type": node.type, "pos": [node.x, node.y], "size": [node.width, node.height],
        "flags": {}, "order": node.id - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
        "properties": properties, "widgets_values": widget_values(node), **node.extra,
    }  # fmt: skip
    return {**written, "title": node.title} if node.title else written


def link_into(links: list[list[Any]], node: int, slot: int) -> int | None:
    return next((link[0] for link in links if link[3:5] == [node, slot]), None)


def links_from(links: list[list[Any]], node: int, slot: int) -> list[int]:
    return [link[0] for link in links if link[1:3] == [node, slot]]


def widget_values(node: Placed) -> list[Any]:
    """The widgets' values in order, each control after its widget."""
    if node.type == "MarkdownNote":
        return list(node.values.values())
    values: list[Any] = []
    for name, spec in node.specs.items():
        if is_widget(spec):
            # Nodes 2.0 shows a linked text's own value too, which is not the one in use.
            linked = name in node.links and spec[0] == "STRING"
            values.append("" if linked else node.values.get(name, default_of(spec)))
            values += ["fixed"] if has_control(name, spec) else []
    return values


def default_of(spec: list[Any]) -> Any:
    """What the editor gives a new node's widget."""
    options = spec[1] if len(spec) > 1 else {}
    choices = options.get("options", spec[0] if isinstance(spec[0], list) else [])
    nothing = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
    first = choices[0] if choices else nothing.get(str(spec[0]), "")
    return options.get("default", first)


def groups_json(layout: Box) -> list[dict[str, Any]]:
    return [
        {
            "id": number, "title": frame.title, "bounding": frame.bounding, "color": frame.colour,
            "font_size": 20, "flags": {},
        }
        for number, frame in enumerate(frames(layout), start=1)
    ]  # fmt: skip
