"""The nodes that refine and compare masks from any source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import UserError
from ..em_core.masks.crf import PRESETS, CRFSettings, MaskRefiner, labels
from ..em_core.masks.measures import iou
from .automatic import AUTOMATIC, Number, checked
from .pictures import labels_of, masks_of, pictures_of, to_mask
from .schema import ADVANCED, CATEGORY, schema
from .telling import on_node

CRF_PRESETS = ["off", *PRESETS]
MASKS = f"{CATEGORY}/masks"
LEAST_SIDE = 256  # pixels of a picture to look at
ITERATIONS = Number(
    "iterations per round",
    "How many mean-field updates to run, in each round if the preset has several.",
    1,
    100,
)


class RefineCRF(io.ComfyNode):
    """Fit masks to the picture's edges with a fully connected conditional random field."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefineCRF",
            display_name="Refine Masks (DenseCRF)",
            category=MASKS,
            search_aliases=["dense crf", "refine mask", "mask edges", "pydensecrf", "clean mask"],
            description="Makes masks follow the edges of the picture (DenseCRF, Kraehenbuehl and Koltun 2011; "
            "pure PyTorch, nothing to compile). 'off' passes them through unchanged.",
            inputs=[
                io.Image.Input("image", tooltip="The picture that the masks belong to."),
                io.Mask.Input(
                    "mask",
                    tooltip="The masks to refine, of any size. For a batch of pictures, give the same number "
                    "of masks for each, in the pictures' order.",
                ),
                io.Combo.Input(
                    "preset",
                    options=CRF_PRESETS,
                    default="local_colour",
                    tooltip="Which settings to use. local_colour: for photos and generated pictures; it mends "
                    "rough masks and leaves good ones alone. cutler and diffumask: those published with CutLER "
                    "and DiffuMask, which change more and can swallow small things. demo: for the demo model's "
                    "64x64 pictures. off: no refinement.",
                ),
                io.Boolean.Input(
                    "together",
                    display_name="refine together (no overlap)",
                    default=True,
                    tooltip="Refine all masks of a picture together, so that none overlap. When off, each is "
                    "refined on its own.",
                ),
                io.Boolean.Input(
                    "soft",
                    display_name="soft masks (grey)",
                    default=False,
                    tooltip="Output the probability at each pixel, in shades of grey, instead of black and white.",
                ),
                ITERATIONS.input("iterations", **ADVANCED),
                io.Int.Input(
                    "working_size",
                    display_name="working size (pixels)",
                    default=512,
                    min=16,
                    max=16384,
                    optional=True,
                    tooltip="Larger pictures are shrunk to this longer side, in pixels, while refining. Lower "
                    "it to save time and memory; the picture's own size or more works at full size.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "strength",
                    display_name="mask strength",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    optional=True,
                    tooltip="How much the given mask counts against the picture, as a multiple of the "
                    "preset's strength. Raise it to stay closer to the mask, lower it for very rough masks; "
                    "near 0 nothing is left of it.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The refined masks, at the picture's size.")],
        )

    @classmethod
    def validate_inputs(cls, iterations: Any = None) -> bool | str:  # type: ignore[override]
        return checked({"iterations": ITERATIONS}, {"iterations": iterations})

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        image: Tensor,
        mask: Tensor,
        preset: str,
        together: bool,
        soft: bool,
        iterations: str = AUTOMATIC,
        working_size: int = 512,
        strength: float = 1.0,
    ) -> io.NodeOutput:
        if preset == "off":
            return io.NodeOutput(mask)
        numbers = PRESETS[preset]
        settings = replace(
            numbers,
            iterations=ITERATIONS.read(iterations) or numbers.iterations,
            working_size=working_size,
            unary_strength=strength * numbers.unary_strength,
            joint=together,
        )
        return io.NodeOutput(refine(image, mask, settings, soft))


def refine(image: Any, mask: Any, settings: CRFSettings, soft: bool) -> Tensor:
    """Refine the masks of each picture.

    Raises:
        UserError: the masks cannot be divided evenly among the pictures.
    """
    pictures, masks = pictures_of(image), masks_of(mask)
    each, rest = divmod(len(masks), len(pictures))
    if rest or not each:
        raise UserError(
            f"Bad number of masks. Expected the same number for each of {len(pictures)} picture(s), got "
            f"{len(masks)} in all. Combine them with Batch Masks in the pictures' order."
        )
    refined = []
    for picture, group in zip(pictures, masks.split(each), strict=True):
        marginals = MaskRefiner(picture, settings)(group)
        refined.append(marginals if soft else labels(marginals, settings.joint).float())
    return to_mask(refined)


class CompareConceptMasks(io.ComfyNode):
    """Measure how well masks agree (intersection over union)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="CompareConceptMasks",
            display_name="Compare Masks (IoU)",
            category=MASKS,
            search_aliases=["iou", "mask accuracy", "intersection over union", "mask difference"],
            description="Measures how well masks agree: intersection over union (IoU) of each pair, from 0 (no "
            "overlap) to 1 (identical). In the overlay, white is in both masks, red only in the first, blue "
            "only in the second.",
            inputs=[
                io.Mask.Input("mask", tooltip="The masks to check, such as those that were found."),
                io.Mask.Input(
                    "reference",
                    tooltip="The masks to compare with, such as the true ones, as many as there are to check.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="The IoU of each pair, and their mean."
                ),
                io.Float.Output(
                    "iou",
                    display_name="mean IoU",
                    tooltip="The mean IoU of all pairs, from 0 to 1.",
                ),
                io.Image.Output(
                    "overlay",
                    display_name="overlay",
                    tooltip="One picture per pair that shows where the masks differ; small ones are enlarged.",
                ),
            ],
        )

    @classmethod
    def execute(cls, mask: Tensor, reference: Tensor) -> io.NodeOutput:  # type: ignore[override]
        text, mean, overlays = compare(mask, reference)
        return io.NodeOutput(text, mean, overlays, ui=on_node(text))


def compare(mask: Any, reference: Any) -> tuple[str, float, Tensor]:
    """Return a text with every IoU, the mean IoU, and one overlay per pair.

    Raises:
        UserError: the numbers of masks differ.
    """
    truth = masks_of(reference)
    found, truth_labels = masks_of(mask), truth > 0.5
    if len(found) != len(truth):
        raise UserError(
            f"Bad number of masks. Expected {len(truth)} (one per reference mask), got {len(found)}. "
            "Connect as many masks as references."
        )
    cut = labels_of(found, (truth.shape[-2], truth.shape[-1]))
    values = iou(cut, truth_labels).tolist()
    mean = sum(values) / len(values)
    lines = [f"{number}: {value:.3f}" for number, value in enumerate(values, start=1)]
    return "\n".join([*lines, f"mean: {mean:.3f}"]), mean, difference_pictures(cut, truth_labels)


def difference_pictures(first: Tensor, second: Tensor) -> Tensor:
    """Paint white what is in both masks, red what is only in the first, blue what is only in the second.

    Small masks are enlarged by a whole number: the editor shows pictures no larger than they are.
    """
    both = first & second
    painted = torch.stack([first.float(), both.float(), second.float()], dim=-1)
    times = max(1, LEAST_SIDE // max(first.shape[-2:]))
    return painted.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
