"""What a graph shows before it runs: concepts that are applied to nothing, told on the nodes concerned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths

from ..em_core.errors import UserError
from ..em_core.exchange.describing import described_triggers
from ..em_core.prompts import LOADERS, MARK, NAME, ConceptPrompt
from ..em_core.runs.concept_set import Outline
from .files import KIND
from .telling import running_server, show_on_node

Graph = Mapping[str, Mapping[str, Any]]
APPLY, EXAMPLE, OURS = (
    "ApplyConceptTokens",
    "ConceptExample",
    ("ConceptExample", "ExtractLatentMasks"),
)
LORA, LORA_MODEL_ONLY = "LoraLoader", "LoraLoaderModelOnly"
SEE = "ApplyVisualCondition"
MODEL, CLIP = 0, 1


def notices(graph: Graph) -> dict[str, str]:
    """Return what a user should know of a graph in API format, by the node where it belongs."""
    found = {}
    for name, node in graph.items():
        said = lonely_output(graph, name) if node.get("class_type") in (APPLY, SEE) else None
        said = said or unapplied_mark(graph, name) or unused_tokens(graph, name)
        if said:
            found[name] = said
    return found


def lonely_output(graph: Graph, name: str) -> str | None:
    """Say which of the MODEL and CLIP of a node that applies is not used while the other one is."""
    used = {
        value[1]
        for node in graph.values()
        for value in links(node)
        if str(value[0]) == name and value[1] in (MODEL, CLIP)
    }
    if used == {CLIP} and graph[name].get("class_type") == SEE:
        return "Only the CLIP of this node is connected. Connect its MODEL to the sampler, which has to look."
    if used == {CLIP} and needs_model(graph, graph[name].get("inputs", {})):
        return (
            "Only the CLIP of this node is connected. Connect its MODEL to the sampler too: without it, "
            "masks do not act, nor do weights that were learned with the concepts."
        )
    if used == {MODEL}:
        return (
            "Only the MODEL of this node is connected. Connect its CLIP to CLIP Text Encode too: without it, "
            "no prompt knows the concepts."
        )
    return None


def needs_model(graph: Graph, inputs: Mapping[str, Any]) -> bool:
    """Return whether an ApplyConceptTokens may change the MODEL: by masks or by learned weights."""
    if isinstance(inputs.get("masks"), list):
        return True
    source = inputs.get("concepts")
    node = graph.get(str(source[0]), {}) if isinstance(source, list) else {}
    told = node.get("inputs", {})
    if node.get("class_type") == "LearnConcepts":
        return bool(told.get("joint") != "nothing")
    if node.get("class_type") == "LoadConcepts":
        concepts = concepts_in_file(str(told.get("name")))
        return concepts is None or concepts.has_weights
    return True


def unapplied_mark(graph: Graph, name: str) -> str | None:
    """Say where a prompt marks a concept of this graph for a CLIP that comes from no ApplyConceptTokens."""
    node = graph[name]
    if node.get("class_type") in OURS or not isinstance(node.get("inputs", {}).get("clip"), list):
        return None
    marks = {mark for text in texts_of(graph, name) for mark in MARK.findall(text)}
    names = concept_names(graph)
    known = {m for m in marks if (is_name(m) if names is None else m in names)}
    if not known or any(graph[one].get("class_type") in (APPLY, SEE) for one in above(graph, name)):
        return None
    return (
        f"This prompt has <{'>, <'.join(sorted(known))}>, but its CLIP does not come from an Apply Concept Tokens, "
        "so it is read as plain text. Connect the CLIP of that node."
    )


def unused_tokens(graph: Graph, name: str) -> str | None:
    """Say where a LoRA with tokens in it is loaded without them, or no prompt has its trigger words."""
    node = graph[name]
    file = node.get("inputs", {}).get("lora_name")
    if node.get("class_type") not in (LORA, LORA_MODEL_ONLY) or not isinstance(file, str):
        return None
    path = folder_paths.get_full_path("loras", file)
    triggers = described_triggers(Path(path)) if path else {}
    means = {concept: " ".join(words) for concept, words in triggers.items()}
    if means and node["class_type"] == LORA_MODEL_ONLY:
        return (
            f"{file} has the tokens of {', '.join(means)} in it, which this loader drops. Use Load LoRA (Model and "
            "CLIP), and its CLIP for the prompts."
        )
    texts = [
        " ".join(value.lower().split())
        for one in graph.values()
        for value in one.get("inputs", {}).values()
        if isinstance(value, str)
    ]
    if not means or any(words in text for words in means.values() for text in texts):
        return None
    told = ", ".join(f"{words} ({concept})" for concept, words in means.items())
    return f"No prompt of this graph has a trigger word of {file}: {told}."


def links(node: Mapping[str, Any]) -> list[Any]:
    """Return a node's inputs that are linked, as [node, output] each."""
    return [v for v in node.get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]


def above(graph: Graph, name: str) -> Iterator[str]:
    """Yield every node that a node depends on."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for link in links(graph[waiting.pop()]):
            source = str(link[0])
            if source in graph and source not in seen:
                seen.add(source)
                waiting.append(source)
                yield source


def texts_of(graph: Graph, name: str) -> list[str]:
    """Return the texts in a node and in those linked to it directly."""
    nodes = [graph[name], *(graph[str(v[0])] for v in links(graph[name]) if str(v[0]) in graph)]
    return [
        value
        for node in nodes
        if node.get("class_type") not in OURS
        for value in node.get("inputs", {}).values()
        if isinstance(value, str)
    ]


def is_name(mark: str) -> bool:
    return bool(NAME.fullmatch(mark)) and mark.lower() not in LOADERS


def concept_names(graph: Graph) -> set[str] | None:
    """Return the names that the graph's examples mark, and those in the concept files that it loads.

    None means any: an example gets its prompt from another node.
    """
    names: set[str] = set()
    for node in graph.values():
        kind, inputs = node.get("class_type"), node.get("inputs", {})
        if kind == EXAMPLE and not isinstance(inputs.get("prompt"), str):
            return None
        if kind == EXAMPLE:
            names |= names_in(inputs["prompt"])
        if kind == "LoadConcepts":
            concepts = concepts_in_file(str(inputs.get("name")))
            names |= set(concepts.names) if concepts else {str(inputs.get("concept", "")).strip()}
    return names


def names_in(prompt: str) -> set[str]:
    try:
        return set(ConceptPrompt.parse(prompt).names)
    except UserError:  # said when the node runs
        return set()


def concepts_in_file(name: str) -> Outline | None:
    """Return what a concept file is about, or None if it cannot be read, which is said when it is loaded."""
    path = folder_paths.get_full_path(KIND, name)
    try:
        return Outline.read(path) if path else None
    except UserError:
        return None


def tell(request: dict[str, Any]) -> dict[str, Any]:
    """Tell what a queued graph shows; it is queued as it is. A handler for ComfyUI's server."""
    for node, text in notices(request.get("prompt") or {}).items():
        logging.warning("Node %s: %s", node, text)
        show_on_node(text, node)
    return request


def listen() -> None:
    """Look at every graph that is queued from now on."""
    server = running_server()
    if server is not None and tell not in server.on_prompt_handlers:
        server.add_on_prompt_handler(tell)
