"""The workflows for checkpoints on the demo model: its loader for theirs, its scenes and words for photographs.

Every other node, link and widget stays as it is, so that a run proves them.
"""

from __future__ import annotations

import copy
from typing import Any

Graph = dict[str, dict[str, Any]]
TWO = "<{}:square> and <{}:circle> on sand"
WORDS = {
    "<rex:dog> on <shore:beach>": TWO.format("rex", "shore"),
    "<rex:dog> on <grass:grass>": TWO.format("rex", "grass"),
    "<cat:cat> on <sofa:sofa>": TWO.format("cat", "sofa"),
    "<dog:dog> on <grass:grass>": TWO.format("dog", "grass"),
    "a fox on a sofa": "a heart on sand",
    "in the snow, mountains": "on snow",
    "in the snow": "on snow",
    "on a sofa, detailed fur": "on wood",
    "on a sofa": "on wood",
    "in a garden": "on grass",
    "on a beach": "on sand",
    "ohwx dog": "square",
}
"""What the demo model does not know, and what it has instead."""
PROMPTS = ("text", "prompt", "prompts")
SIDE, LATENT = 64, 128
"""Of the demo model's pictures, and of the empty latent that gives them."""


def on_demo(graph: Graph, steps: int = 2, learning: int = 2, seed: int | None = None) -> Graph:
    """A workflow in API format as it runs on the demo model, with so many steps of sampling and learning.

    Workflows that differ in their checkpoints alone are one graph then; with a `seed` for each, none is
    answered from what a server keeps of another.
    """
    changed = copy.deepcopy(graph)
    for name, node in graph.items():
        change = CHANGES.get(node["class_type"])
        if change is not None:
            change(changed, name)
    for node in [*changed.values()]:
        inputs = node["inputs"]
        for prompt in PROMPTS:
            if isinstance(inputs.get(prompt), str):
                inputs[prompt] = in_demo_words(inputs[prompt])
        if node["class_type"] == "KSampler":
            inputs["cfg"] = 3.0
        if seed is not None and isinstance(inputs.get("seed"), int):
            inputs["seed"] = seed
    return shortened(changed, steps, learning)


def shortened(graph: Graph, steps: int = 2, learning: int = 2) -> Graph:
    """A workflow with so many steps of sampling and learning."""
    for node in [*graph.values()]:
        inputs = node["inputs"]
        if node["class_type"] == "LearnConcepts":
            inputs["steps"] = learning
            settings = inputs.setdefault("settings", ["few", 0])
            few = {"class_type": "ConceptSettings", "inputs": {}}
            graph.setdefault(settings[0], few)["inputs"]["joint_steps"] = str(learning)
        if node["class_type"] == "LearnVisualCondition":
            inputs |= {"steps": learning, "em_steps": str(learning)}
        if node["class_type"] == "KSampler":
            inputs["steps"] = steps
        if node["class_type"] == "EvaluateConcepts":
            inputs |= {"steps": steps, "passes": steps, "count": 2}
        if node["class_type"] == "TrainLoraNode":
            inputs |= {"steps": 2, "training_dtype": "fp32", "lora_dtype": "fp32"}
    return graph


def in_demo_words(text: str) -> str:
    for foreign, known in WORDS.items():
        text = text.replace(foreign, known)
    return text


def replaced(node: str, /, **inputs: Any) -> Any:
    """A change that puts another node in a node's place."""
    return lambda graph, name: graph.update({name: {"class_type": node, "inputs": dict(inputs)}})


def resized(side: int) -> Any:
    """A change of a node's picture size."""
    return lambda graph, name: graph[name]["inputs"].update({"width": side, "height": side})


def control_net(graph: Graph, name: str) -> None:
    """A ControlNet of the demo model's shape, with random weights; it needs the model."""
    model = next(n for n, of in graph.items() if "ckpt_name" in of["inputs"] or not of["inputs"])
    graph[name] = {"class_type": "TestControlNet", "inputs": {"model": [model, 0], "seed": 0}}


def true_masks(graph: Graph, name: str) -> None:
    """SAM 3's masks: the true ones of the scene, each a batch of one."""
    scene = next(
        n for n, of in graph.items() if of["class_type"] in ("LoadImage", "ConceptDemoScene")
    )
    if any(of["class_type"] == "SAM3_Detect" for of in graph.values()):
        for node in graph.values():
            for key, value in node["inputs"].items():
                if value == [name, 0]:
                    node["inputs"][key] = [scene, 2]
        del graph[name]


CHANGES: dict[str, Any] = {
    "BatchMasksNode": true_masks,
    "CheckpointLoaderSimple": replaced("LoadConceptDemoModel"),
    "LoadImage": replaced("ConceptDemoScene", seed=3, kind="A"),
    "CLIPVisionLoader": replaced("TestClipVision", kind="clip", seed=0),
    "ControlNetLoader": control_net,
    "EmptyLatentImage": resized(LATENT),
    "ImageScale": resized(SIDE),
}
