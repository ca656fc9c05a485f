"""The node that finds masks from a prompt, for plain words and learned concepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from warnings import warn

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..em_core.errors import Notice, UserError
from ..em_core.examples import Example
from ..em_core.masks.resizing import resize
from ..em_core.masks.settings import MaskSettings
from ..em_core.pictures import Picture
from ..em_core.presets import em_settings
from ..em_core.prompts import ConceptPrompt, require_no_weights
from ..em_core.runs.concept_set import ConceptSet
from ..em_core.runs.finding import find_masks
from ..em_core.show.words import say_found, say_masks
from .automatic import AUTOMATIC, advanced_inputs, checked, read, why_not
from .host.application import require_same_family
from .host.comfy_host import ComfyHost
from .host.families import identify
from .masks import CRF_PRESETS, MASKS, PRESETS
from .pictures import pictures_of, to_mask
from .results import shown
from .schema import ADVANCED, Concepts, Examples, schema
from .settings import NUMBERS as ALL_NUMBERS
from .telling import on_node, told_on_node

EXAMPLE = "a photo of <cat:cat> on <sofa:sofa>"
NUMBERS = {"threshold": ALL_NUMBERS["threshold"]}
WARM = (1.0, 0.55, 0.1)


class ExtractLatentMasks(io.ComfyNode):
    """Read masks off a checkpoint's cross-attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ExtractLatentMasks",
            display_name="Extract Latent Masks (Segment by Text)",
            category=MASKS,
            search_aliases=["segment", "mask", "text to mask", "segment by text", "daam", "clipseg"],
            description="Turns text into masks with any SD 1.x, 2.x or SDXL checkpoint. Mark what to find, as "
            f"in: {EXAMPLE}. If you connect learned concepts, <name> alone finds them in other pictures.",
            inputs=[
                io.Model.Input("model", tooltip="Any Stable Diffusion 1.x, 2.x or SDXL checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint as the MODEL."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint as the MODEL."),
                io.Image.Input("image", tooltip="The picture, or batch of pictures, to search."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="Describe the picture and mark what to find as <any_name:words>, or as <name> for "
                    "a learned concept. Marking the background as well makes the masks sharper.",
                ),
                Concepts.Input(
                    "concepts", optional=True,
                    tooltip="Learned concepts, if the prompt uses any. Leave it empty to search for plain words.",
                ),
                io.Int.Input(
                    "passes", display_name="passes (noise samples)", default=20, min=1, max=200, optional=True,
                    tooltip="How many noisy versions of the picture are averaged. More passes give steadier "
                    "masks but take longer.", **ADVANCED,
                ),
                *advanced_inputs(NUMBERS),
                io.Combo.Input(
                    "crf", display_name="follow edges (DenseCRF)",
                    options=[AUTOMATIC, *CRF_PRESETS], default=AUTOMATIC, optional=True,
                    tooltip="Makes the masks follow the picture's edges (DenseCRF). 'automatic' is what suits "
                    "the model, 'off' leaves this out.", **ADVANCED,
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, optional=True, control_after_generate=False,
                    tooltip="Seed of the random noise. Change it to search with different noise.", **ADVANCED,
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "masks", display_name="masks",
                    tooltip="One mask per marked name, for one picture after the other.",
                ),
                io.Image.Output(
                    "heat", display_name="heat maps",
                    tooltip="How strongly each spot responds to each name, glowing over the dimmed picture.",
                ),
                Examples.Output(
                    "found", display_name="examples",
                    tooltip="The pictures with the prompt and these masks, each at its picture's size. Connect "
                    "them to Concept Mask by Name, or to Learn Concepts with masks 'given'.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompt: Any = None, threshold: Any = None) -> bool | str:  # type: ignore[override]
        if isinstance(prompt, str) and (wrong := why_not(required_prompt, prompt)):
            return wrong
        return checked(NUMBERS, {"threshold": threshold})

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
        threshold: str = AUTOMATIC,
        crf: str = AUTOMATIC,
        seed: int = 0,
    ) -> io.NodeOutput:
        parsed = required_prompt(prompt)
        pictures = pictures_of(image)
        models = identify(model, clip, vae)
        if concepts is not None:
            require_same_family(concepts, clip)
        host = ComfyHost(models)
        settings = mask_settings(em_settings(host.models.family).masks, passes, threshold, crf)
        try:
            results = [
                find_masks(host, picture, parsed, concepts, settings, seed) for picture in pictures
            ]
        finally:
            host.release()
        with told_on_node() as told:
            for number, result in enumerate(results, start=1):
                said = say_found(result, number, len(results))
                if said:
                    warn(said, Notice, stacklevel=2)
        pairs = zip(pictures, results, strict=True)
        heat = torch.cat([heat_maps(picture, result.maps) for picture, result in pairs])
        found = [dict(zip(result.names, result.masks, strict=True)) for result in results]
        masks = to_mask([result.masks for result in results])
        examples = tuple(
            Example(picture, parsed, named) for picture, named in zip(pictures, found, strict=True)
        )
        return io.NodeOutput(
            masks,
            heat,
            examples,
            ui=on_node(
                say_masks(found),
                *told,
                say_threshold(settings, threshold),
                pictures=[shown(examples)],
            ),
        )


def required_prompt(text: str) -> ConceptPrompt:
    """Return the prompt.

    Raises:
        UserError: it is empty, marks nothing, has weights, or its marks cannot be read.
    """
    if not text.strip():
        raise UserError(
            f"The prompt is empty. Describe the picture and mark what to find, as in: {EXAMPLE}"
        )
    require_no_weights(text)
    return ConceptPrompt.parse(text).require_concepts()


def mask_settings(settings: MaskSettings, passes: int, threshold: str, crf: str) -> MaskSettings:
    """Return the family's settings with the node's inputs applied.

    Raises:
        UserError: the threshold is neither "automatic" nor a number in its range.
    """
    settings = replace(settings, init_timesteps=passes)
    settings = replace(settings, **read(NUMBERS, {"threshold": threshold}))
    if crf == AUTOMATIC:
        return settings
    return replace(settings, crf=None if crf == "off" else PRESETS[crf])


def say_threshold(settings: MaskSettings, given: str) -> str:
    """A line with the threshold that stands for "automatic"; empty if a number was given."""
    automatic = not read(NUMBERS, {"threshold": given})
    return f"Automatic: {NUMBERS['threshold'].label} {settings.threshold}." if automatic else ""


def heat_maps(picture: Picture, maps: Tensor) -> Tensor:
    """Draw each map as a glow over the dimmed picture."""
    glow = resize(maps, (picture.shape[-2], picture.shape[-1]), "map")
    colour = torch.tensor(WARM)[:, None, None]
    shown = 0.35 * picture[None] + 0.65 * glow[:, None] * colour
    return rearrange(shown.clamp(0, 1), "k c h w -> k h w c").clone()
