"""Pieces of graphs that several tests use."""

from dataclasses import dataclass
from typing import Any

from server import Builder, Node

MAIN: dict[str, Any] = {
    "mode": "find and improve", "steps": 8, "seed": 0, "joint": "nothing", "memory": "automatic",
}  # fmt: skip
"""LearnConcepts' own inputs, with what tests mostly use."""
PROMPT = "a photo of <rex> and <doll> on grass"


@dataclass
class Parts:
    """A graph that learns from a demo scene."""

    b: Builder
    model: Node
    scene: Node
    examples: Node
    learn: Node


def learning(patch: str = "", patch_inputs: dict[str, Any] | None = None, **changes: Any) -> Parts:
    """Demo model, demo scene, example, and LearnConcepts with few steps; `patch` is a node on MODEL.

    Changes are of LearnConcepts' own inputs, or else of Concept Settings'.
    """
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    examples = b.add("ConceptExample", image=scene, prompt=scene[1], masks=scene[2])
    patched = b.add(patch, model=model, **(patch_inputs or {})) if patch else model
    own = {name: changes.pop(name, value) for name, value in MAIN.items()}
    settings = b.add(
        "ConceptSettings", **({"e_step_every": 4, "batch": 2, "crf": "demo"} | changes)
    )
    learn = b.add(
        "LearnConcepts", model=patched, clip=model[1], vae=model[2], examples=examples,
        settings=settings, **own,
    )  # fmt: skip
    return Parts(b, model, scene, examples, learn)


def applied(p: Parts, model: Any = None) -> Node:
    """ApplyConceptTokens of what is learned."""
    return p.b.add(
        "ApplyConceptTokens",
        model=model or p.model,
        clip=p.model[1],
        concepts=p.learn,
        strength=1.0,
    )


def sample(
    b: Builder,
    model: Any,
    clip: Any,
    text: str,
    positive: Any = None,
    latent: Any = None,
    **changes: Any,
) -> Node:
    """A KSampler of few steps."""
    positive = positive or b.add("CLIPTextEncode", clip=clip, text=text)
    negative = b.add("CLIPTextEncode", clip=clip, text="")
    latent = latent or b.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    inputs: dict[str, Any] = {
        "seed": 1, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return b.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        **(inputs | changes),
    )
