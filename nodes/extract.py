"""Masks from a prompt: words or learned concepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.masks.resizing import resize
from ..em_core.masks.settings import MaskSettings
from ..em_core.pictures import Picture
from ..em_core.presets import em_settings
from ..em_core.prompts import ConceptPrompt
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.runs.finding import find_masks
from .host.application import require_same_family
from .host.comfy_host import ComfyHost
from .host.families import identify
from .learn import AUTO
from .masks import CRF_PRESETS, MASKS, PRESETS
from .pictures import pictures_of, to_mask
from .schema import ADVANCED, Concepts, schema

EXAMPLE = "a photo of <cat:cat> on <sofa:sofa>"
WARM = (1.0, 0.55, 0.1)


class ExtractLatentMasks(io.ComfyNode):
    """Reads masks off a checkpoint's cross-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ExtractLatentMasks",
            display_name="Extract Latent Masks",
            category=MASKS,
            search_aliases=["text to mask", "segment by text", "attention map", "daam", "clipseg"],
            description="Text to mask with any SD 1.x, 2.x or SDXL checkpoint: mark what is to be found, as in: "
            f"{EXAMPLE}. With learned concepts, <name> alone finds them in other pictures.",
            inputs=[
                io.Model.Input("model", tooltip="Any Stable Diffusion 1.x, 2.x or SDXL checkpoint."),
                io.Clip.Input("clip", tooltip="From the same checkpoint."),
                io.Vae.Input("vae", tooltip="From the same checkpoint."),
                io.Image.Input("image", tooltip="The pictures to look in."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="Describe the picture; mark what is to be found as <any_name:words>, or <name> of a "
                    "learned concept. Naming the background as well makes the masks sharper.",
                ),
                Concepts.Input("concepts", optional=True, tooltip="Learned concepts that the prompt names."),
                io.Int.Input(
                    "passes", default=20, min=1, max=200, optional=True,
                    tooltip="Noise samples that are averaged: more is steadier and slower.", **ADVANCED,
                ),
                io.Float.Input(
                    "threshold", default=0.0, min=0.0, max=1.0, step=0.01, optional=True,
                    tooltip="What a map scaled to 0..1 must exceed. 0: what suits the model.", **ADVANCED,
                ),
                io.Combo.Input(
                    "crf", options=[AUTO, *CRF_PRESETS], default=AUTO, optional=True,
                    tooltip="DenseCRF that refines the masks.", **ADVANCED,
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, optional=True, control_after_generate=False,
                    tooltip="Of the noise.", **ADVANCED,
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "masks", display_name="masks", tooltip="One per name, for each picture in turn."
                ),
                io.Image.Output("heat", display_name="heat maps", tooltip="The attention itself."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        image: Tensor,
        prompt: str,
        concepts: ConceptSet | None = None,
        passes: int = 20,
        threshold: float = 0.0,
        crf: str = AUTO,
        seed: int = 0,
    ) -> io.NodeOutput:
        if not prompt.strip():
            raise UserError(f"The prompt is empty. Mark what is to be found, as in: {EXAMPLE}")
        parsed = ConceptPrompt.parse(prompt).require_concepts()
        pictures = pictures_of(image)
        if concepts is not None:
            require_same_family(concepts, clip)
        host = ComfyHost(identify(model, clip, vae))
        settings = mask_settings(em_settings(host.models.family).masks, passes, threshold, crf)
        try:
            found = [find_masks(host, p, parsed, concepts, settings, seed) for p in pictures]
        finally:
            host.release()
        heat = torch.cat([heat_maps(p, f.maps) for p, f in zip(pictures, found, strict=True)])
        return io.NodeOutput(to_mask([f.masks for f in found]), heat)


def mask_settings(settings: MaskSettings, passes: int, threshold: float, crf: str) -> MaskSettings:
    """The family's settings, changed as asked."""
    settings = replace(settings, init_timesteps=passes)
    if threshold:
        settings = replace(settings, threshold=threshold)
    if crf == AUTO:
        return settings
    return replace(settings, crf=None if crf == "off" else PRESETS[crf])


def heat_maps(picture: Picture, maps: Tensor) -> Tensor:
    """The picture dimmed, with each map glowing over it."""
    glow = resize(maps, (picture.shape[-2], picture.shape[-1]), "map")
    colour = torch.tensor(WARM)[:, None, None]
    shown = 0.35 * picture[None] + 0.65 * glow[:, None] * colour
    return rearrange(shown.clamp(0, 1), "k c h w -> k h w c").clone()
