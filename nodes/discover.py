"""The node that finds the things in a picture without a word about them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.runs.finding import discover
from ..em_core.show.words import say_masks
from .host.comfy_host import ComfyHost
from .host.families import identify
from .masks import MASKS
from .pictures import pictures_of, to_mask
from .results import shown
from .schema import ADVANCED, Examples, schema
from .telling import on_node


class DiscoverConcepts(io.ComfyNode):
    """Count the things in a picture, with a mask for each and the prompt to learn them with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiscoverConcepts",
            display_name="Discover Concepts",
            category=MASKS,
            search_aliases=["segment", "segment anything", "auto mask", "instances", "what is in this picture"],
            description="Finds the things in a picture without being told what they are: how many, a mask for "
            "each, and the prompt to learn them with. They are named concept1, concept2, ... from left to "
            "right. Connect examples to Learn Concepts to learn them all.",
            inputs=[
                io.Model.Input("model", tooltip="Any Stable Diffusion 1.x, 2.x or SDXL checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint as the MODEL."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint as the MODEL."),
                io.Image.Input("image", tooltip="The picture to search; one, not a batch."),
                io.Int.Input(
                    "most", display_name="at most (things)", default=8, min=1, max=20, optional=True,
                    tooltip="How many things to find at most. Lower it if small things are not wanted.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, optional=True, control_after_generate=False,
                    tooltip="Seed of the random noise. Change it to search with different noise.", **ADVANCED,
                ),
            ],
            outputs=[
                io.String.Output(
                    "prompt", display_name="prompt",
                    tooltip="The prompt that names every thing. Connect it to Concept Example.",
                ),
                io.Mask.Output(
                    "masks", display_name="masks", tooltip="One mask per thing, from left to right.",
                ),
                io.Int.Output("count", display_name="count", tooltip="How many things were found."),
                Examples.Output(
                    "examples", display_name="examples",
                    tooltip="The picture with that prompt and these masks. Connect it to Learn Concepts.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(  # type: ignore[override]
        cls, model: Any, clip: Any, vae: Any, image: Tensor, most: int = 8, seed: int = 0
    ) -> io.NodeOutput:
        pictures = pictures_of(image)
        if len(pictures) != 1:
            raise UserError(
                f"Bad image. Expected one picture, got a batch of {len(pictures)}. Connect one of them, "
                "for instance through Image From Batch."
            )
        host = ComfyHost(identify(model, clip, vae))
        try:
            prompt, found = discover(host, pictures[0], seed=seed, most=most)
        finally:
            host.release()
        masks = dict(zip(found.names, found.masks, strict=True))
        examples = (Example(pictures[0], prompt, masks),)
        return io.NodeOutput(
            str(prompt),
            to_mask([found.masks]),
            len(found.names),
            examples,
            ui=on_node(say_masks([masks]), str(prompt), pictures=[shown(examples)]),
        )
