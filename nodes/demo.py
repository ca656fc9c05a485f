"""The demo model and its scenes, so that every node can be tried before a checkpoint is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .schema import CATEGORY, schema

DEMO = f"{CATEGORY}/demo"


class LoadConceptDemoModel(io.ComfyNode):
    """Load the small model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadConceptDemoModel",
            display_name="Load Demo Model",
            category=DEMO,
            search_aliases=["checkpoint", "example model", "tiny stable diffusion"],
            description="Loads a tiny Stable Diffusion model that comes with the pack and only knows a world "
            "of shapes, colours and patterns. Use it to try the nodes without a GPU or a download; it is not a "
            "substitute for a real checkpoint. Its VAE shrinks pictures by 4 instead of 8, so an empty latent "
            "of 128x128 makes a picture of 64x64.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The demo model's UNet, the part that draws."),
                io.Clip.Output(
                    tooltip="The demo model's text encoder. It refuses words that it was never shown."
                ),
                io.Vae.Output(
                    tooltip="The demo model's VAE. It turns 64x64 pixels into a 16x16 latent."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:  # type: ignore[override]
        from ..em_core.demo import model_path
        from .host.demo_model import load_demo_model

        return io.NodeOutput(*load_demo_model(model_path()))


class ConceptDemoScene(io.ComfyNode):
    """Render a picture with concepts that the demo model has never seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ConceptDemoScene",
            display_name="Demo Scene",
            category=DEMO,
            search_aliases=["example image", "test picture"],
            description="Renders a picture of objects that the demo model has never seen, together with "
            "the prompt that marks them as concepts and their true masks.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=3,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Chooses the scene. The same seed and kind always give the same scene.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["A", "B", "C", "D", "E", "F", "G", "I", "J"],
                    default="A",
                    tooltip="What is in the picture. A: two new combinations of known looks. B: new colours and "
                    "patterns. C: new shapes, both called by one vague word. D: the same without words. E: two of "
                    "a kind. F: four concepts. G: clutter, some of it not named. I: two objects that touch, and "
                    "the background as a concept. J: two of a kind, and a bystander that is not named.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture, 64x64 pixels."),
                io.String.Output(
                    "prompt",
                    display_name="prompt",
                    tooltip="The prompt that marks the concepts. Connect it to Concept Example.",
                ),
                io.Mask.Output(
                    tooltip="The true mask of each concept, in the order of the prompt."
                ),
            ],
        )

    @classmethod
    def execute(cls, seed: int, kind: str) -> io.NodeOutput:  # type: ignore[override]
        from ..em_core.demo.scenes import concept_scene
        from ..em_core.prompts import ConceptPrompt

        scene: Any = concept_scene(seed, kind)
        image = torch.from_numpy(scene.image.copy()).float()[None] / 255
        names = ConceptPrompt.parse(scene.prompt).names
        masks = torch.stack([torch.from_numpy(scene.masks[name].copy()) for name in names])
        return io.NodeOutput(image, scene.prompt, masks.float())
