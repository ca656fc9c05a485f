"""The blueprints: a few nodes of this pack as one, with the widgets that matter on it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

from templates.boxes import column, row
from templates.editor import INLETS, OUTLETS, SPACE, Placed, Sheet, groups_json, kind_of, node_json

Info = Mapping[str, Any]
CATEGORY = "Visual Concepts"
Shown = list[tuple[Placed, str]]
"""Widgets of nodes inside that the blueprint shows."""


def learn_from_one(info: Info) -> tuple[Sheet, Shown]:
    sheet = Sheet(
        info,
        "Learn concepts from one picture",
        "Learns a token and a mask for each thing that the prompt marks, as in <rex:dog> on <shore:beach>.",
    )
    model, clip, vae = (
        sheet.inlet(n, k) for n, k in (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))
    )
    example = sheet.add("ConceptExample", width=320, image=sheet.inlet("image", "IMAGE"))
    learned = sheet.add("LearnConcepts", model=model, clip=clip, vae=vae, examples=example)
    for name in ("concepts", "masks", "curves", "examples"):
        sheet.outlet(name, learned[name])
    sheet.arrange(row(example, learned))
    return sheet, [(example, "prompt"), (learned, "steps"), (learned, "joint")]


def find_and_refine(info: Info) -> tuple[Sheet, Shown]:
    sheet = Sheet(
        info,
        "Find masks and refine them",
        "Finds what the prompt marks in a picture, and makes the masks follow its edges.",
    )
    model, clip, vae = (
        sheet.inlet(n, k) for n, k in (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE"))
    )
    image = sheet.inlet("image", "IMAGE")
    found = sheet.add(
        "ExtractLatentMasks", width=320, model=model, clip=clip, vae=vae, image=image, crf="off",
        concepts=sheet.inlet("concepts", "VISUAL_CONCEPTS"),
    )  # fmt: skip
    refined = sheet.add("RefineCRF", width=300, image=image, mask=found["masks"])
    sheet.outlet("masks", refined["MASK"])
    sheet.outlet("heat maps", found["heat maps"])
    sheet.arrange(row(found, refined))
    return sheet, [(found, "prompt"), (refined, "preset")]


def apply_and_lay_out(info: Info) -> tuple[Sheet, Shown]:
    sheet = Sheet(
        info,
        "Apply concepts and lay them out",
        "Makes <name> work in a prompt, each concept inside its mask if there are masks.",
    )
    applied = sheet.add(
        "ApplyConceptTokens", model=sheet.inlet("model", "MODEL"), clip=sheet.inlet("clip", "CLIP"),
        concepts=sheet.inlet("concepts", "VISUAL_CONCEPTS"), masks=sheet.inlet("masks", "MASK"),
    )  # fmt: skip
    prompt = sheet.add(
        "CLIPTextEncode", title="Prompt", clip=applied["CLIP"], text="a photo of <rex> on a beach"
    )
    negative = sheet.add("CLIPTextEncode", title="Negative prompt", clip=applied["CLIP"], text="")
    sheet.outlet("MODEL", applied["MODEL"])
    sheet.outlet("positive", prompt["CONDITIONING"])
    sheet.outlet("negative", negative["CONDITIONING"])
    sheet.arrange(row(applied, column(prompt, negative)))
    return sheet, [(prompt, "text"), (negative, "text"), (applied, "strength")]


def blueprint(sheet: Sheet, shown: Shown) -> dict[str, Any]:
    """The file of a blueprint: one node, and what is inside it."""
    assert sheet.layout is not None
    links, name = sheet.links(), str(uuid.uuid5(SPACE, sheet.name))
    width = sheet.layout.size()[0]
    inside = {
        "id": name, "version": 1, "revision": 0, "config": {}, "name": sheet.name,
        "description": sheet.description, "category": CATEGORY,
        "state": {"lastGroupId": 0, "lastNodeId": len(sheet.nodes), "lastLinkId": len(links),
        "lastRerouteId": 0},
        "inputNode": {"id": INLETS, "bounding": [-220, 40, 120, 40 + 20 * len(sheet.inlets.outputs)]},
        "outputNode": {"id": OUTLETS, "bounding": [width + 100, 40, 120, 40 + 20 * len(sheet.outlets)]},
        "inputs": sockets(sheet.name, "in", sheet.inlets.outputs, links, (1, INLETS), -120),
        "outputs": sockets(
            sheet.name, "out", [(n, kind_of(out)) for n, out in sheet.outlets], links, (3, OUTLETS), width + 120
        ),
        "widgets": [],
        "nodes": [node_json(node, links, sheet.info) for node in sheet.nodes],
        "groups": groups_json(sheet.layout),
        "links": [
            dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=True))
            for link in links
        ],
        "extra": {},
    }  # fmt: skip
    node = {
        "id": 1, "type": name, "pos": [0, 30], "size": [340,
        100 + 20 * len(sheet.inlets.outputs) + 60 * len(shown)],
        "flags": {}, "order": 0, "mode": 0, "title": sheet.name,
        "inputs": [{"name": n, "type": kind, "link": None} for n, kind in sheet.inlets.outputs],
        "outputs": [{"name": n, "type": kind_of(out), "links": []} for n, out in sheet.outlets],
        "properties": {"proxyWidgets": [[str(of.id), widget] for of, widget in shown]},
        "widgets_values": [],
    }  # fmt: skip
    return {
        "id": str(uuid.uuid5(SPACE, f"{sheet.name} as a file")), "revision": 0, "last_node_id": 1,
        "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
        "definitions": {"subgraphs": [inside]}, "extra": {},
    }  # fmt: skip


def sockets(
    name: str,
    way: str,
    named: list[tuple[str, str]],
    links: list[list[Any]],
    end: tuple[int, int],
    x: int,
) -> list[dict[str, Any]]:
    """A blueprint's inputs or outputs, each with the links inside that it has."""
    return [
        {
            "id": str(uuid.uuid5(SPACE, f"{name} {way} {label}")), "name": label, "type": kind,
            "linkIds": [link[0] for link in links if link[end[0]] == end[1] and link[end[0] + 1] == slot],
            "pos": [x, 60 + 20 * slot],
        }
        for slot, (label, kind) in enumerate(named)
    ]  # fmt: skip


BLUEPRINTS: tuple[Callable[[Info], tuple[Sheet, Shown]], ...] = (
    learn_from_one, find_and_refine, apply_and_lay_out,
)  # fmt: skip
