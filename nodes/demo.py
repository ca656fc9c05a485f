"""The demo model and its scenes: everything works with them before any checkpoint is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .schema import CATEGORY, schema

DEMO = f"{CATEGORY}/demo"


class LoadDemoModel(io.ComfyNode):
    """The small model that comes with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoadDemoModel",
            display_name="Load Demo Model",
            category=DEMO,
            search_aliases=["checkpoint", "example model", "tiny stable diffusion"],
            description="A tiny Stable Diffusion that comes with the pack and knows only a world of shapes, "
            "colours and patterns. It makes the nodes testable without a GPU or a download; it is no "
            "substitute for a real checkpoint. Its autoencoder shrinks by 4, not 8: an empty latent of "
            "128x128 makes a picture of 64x64.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The demo model's UNet."),
                io.Clip.Output(
                    tooltip="Its text encoder; it refuses words that it was never shown."
                ),
                io.Vae.Output(tooltip="Its autoencoder: 64x64 pixels to 16x16."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:  # type: ignore[override]
        from ..em_core.demo import model_path
        from .host.demo_model import load_demo_model

        return io.NodeOutput(*load_demo_model(model_path()))


class DemoScene(io.ComfyNode):
    """A picture with two concepts that the demo model has never seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DemoScene",
            display_name="Demo Scene",
            category=DEMO,
            search_aliases=["example image", "test picture"],
            description="A picture of two new objects, the prompt that names them as concepts, and their true "
            "masks. The same seed gives the same scene.",
            inputs=[
                io.Int.Input(
                    "seed",
                    default=3,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Which scene; the same again.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["A", "B", "C"],
                    default="A",
                    tooltip="A: known looks in new combinations. B: new colours and patterns. C: new shapes.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture, 64x64."),
                io.String.Output("prompt", display_name="prompt", tooltip="For Concept Example."),
                io.Mask.Output(tooltip="The true mask of each concept, in the prompt's order."),
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
