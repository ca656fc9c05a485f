"""Nodes for masks from anywhere: refining and comparing them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.masks.crf import PRESETS, CRFSettings, MaskRefiner, labels
from ..em_core.masks.measures import iou
from .pictures import labels_of, masks_of, pictures_of, to_mask
from .schema import ADVANCED, CATEGORY, schema

CRF_PRESETS = ["off", *PRESETS]
MASKS = f"{CATEGORY}/masks"


class RefineCRF(io.ComfyNode):
    """A fully connected conditional random field: masks that follow the picture's edges."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefineCRF",
            display_name="Refine Masks (DenseCRF)",
            category=MASKS,
            search_aliases=["dense crf", "refine mask", "mask edges", "pydensecrf", "clean mask"],
            description="Lets masks follow the edges of the picture (DenseCRF, Kraehenbuehl and Koltun 2011; pure "
            "PyTorch, nothing to compile). It mends rough masks and can spoil clean ones: 'off' passes them on.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that the masks belong to."),
                io.Mask.Input(
                    "mask",
                    tooltip="Masks of the picture, of any size. With a batch of pictures: the same number "
                    "of masks for each, in the pictures' order.",
                ),
                io.Combo.Input(
                    "preset",
                    options=CRF_PRESETS,
                    default="cutler",
                    tooltip="Published numbers: CutLER's or DiffuMask's for photos, the demo world's for its "
                    "pictures of 64x64.",
                ),
                io.Boolean.Input(
                    "together",
                    default=True,
                    tooltip="Solve for all masks of a picture at once, so that none overlap. Off: each alone.",
                ),
                io.Boolean.Input(
                    "soft", default=False, tooltip="Give probabilities instead of black and white."
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip="Mean-field updates; 0: the preset's.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "working_size",
                    default=512,
                    min=0,
                    max=4096,
                    optional=True,
                    tooltip="Solve with the longer side at most this long; 0 solves at full size.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    optional=True,
                    tooltip="How much the given mask is trusted against the picture; near 0 nothing is left of it.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The refined masks, at the picture's size.")],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        image: Tensor,
        mask: Tensor,
        preset: str,
        together: bool,
        soft: bool,
        iterations: int = 0,
        working_size: int = 512,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        if preset == "off":
            return io.NodeOutput(mask)
        numbers = PRESETS[preset]
        settings = replace(
            numbers,
            iterations=iterations or numbers.iterations,
            working_size=working_size or None,
            unary_strength=strength,
            joint=together,
        )
        return io.NodeOutput(refine(image, mask, settings, soft))


def refine(image: Any, mask: Any, settings: CRFSettings, soft: bool) -> Tensor:
    """The masks of each picture, refined.

    Raises:
        UserError: the masks cannot be shared out among the pictures.
    """
    pictures, masks = pictures_of(image), masks_of(mask)
    each, rest = divmod(len(masks), len(pictures))
    if rest or not each:
        raise UserError(
            f"Bad number of masks. Expected the same number for each of {len(pictures)} pictures, "
            f"got {len(masks)}. Join them with Batch Masks in the pictures' order."
        )
    refined = []
    for picture, group in zip(pictures, masks.split(each), strict=True):
        marginals = MaskRefiner(picture, settings)(group)
        refined.append(marginals if soft else labels(marginals, settings.joint).float())
    return to_mask(refined)


class CompareMasks(io.ComfyNode):
    """Intersection over union."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="CompareMasks",
            display_name="Compare Masks (IoU)",
            category=MASKS,
            search_aliases=["iou", "mask accuracy", "intersection over union", "mask difference"],
            description="How well masks agree: intersection over union of each pair, and their overlay "
            "(both: white, only the first: red, only the second: blue).",
            inputs=[
                io.Mask.Input("mask", tooltip="Masks, for example found ones."),
                io.Mask.Input("reference", tooltip="As many masks, for example true ones."),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="IoU of each pair, and their mean."
                ),
                io.Float.Output(
                    "iou", display_name="mean IoU", tooltip="Mean over the pairs, 0 to 1."
                ),
                io.Image.Output("overlay", display_name="overlay", tooltip="One picture per pair."),
            ],
        )

    @classmethod
    def execute(cls, mask: Tensor, reference: Tensor) -> io.NodeOutput:  # type: ignore[override]
        text, mean, overlays = compare(mask, reference)
        return io.NodeOutput(text, mean, overlays, ui={"text": [text]})


def compare(mask: Any, reference: Any) -> tuple[str, float, Tensor]:
    """Text, mean IoU, and a picture per pair.

    Raises:
        UserError: other numbers of masks.
    """
    truth = masks_of(reference)
    found, truth_labels = masks_of(mask), truth > 0.5
    if len(found) != len(truth):
        raise UserError(
            f"Cannot compare {len(found)} masks with {len(truth)}. Give as many masks as references."
        )
    cut = labels_of(found, (truth.shape[-2], truth.shape[-1]))
    values = iou(cut, truth_labels).tolist()
    mean = sum(values) / len(values)
    lines = [f"{i}: {value:.3f}" for i, value in enumerate(values, start=1)]
    return "\n".join([*lines, f"mean: {mean:.3f}"]), mean, difference_pictures(cut, truth_labels)


def difference_pictures(a: Tensor, b: Tensor) -> Tensor:
    """White where both are, red where only the first, blue where only the second."""
    both = a & b
    return torch.stack([a.float(), both.float(), b.float()], dim=-1)
