"""The node that gives ComfyUI's own LoRA training a masked loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..em_core.errors import Notice, UserError
from ..em_core.masks.given import looks_inverted
from ..em_core.masks.resizing import cut, resize
from .notices import links
from .pictures import masks_of
from .schema import CATEGORY, schema
from .telling import on_node, told_on_node

TRAIN = "TrainLoraNode"
Caption = list[Any]
"""An entry of a CONDITIONING: the encoded text, and what else samplers are told."""


class MaskTrainingConditioning(io.ComfyNode):
    """Let core's Train LoRA learn each picture inside its mask alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MaskTrainingConditioning",
            display_name="Mask Training Conditioning",
            category=CATEGORY,
            search_aliases=["masked loss", "train lora", "masked training", "lora mask"],
            description="Gives ComfyUI's own Train LoRA a masked loss, for every family of models that it trains: "
            "each picture counts inside its mask alone. Connect it between the captions and Train LoRA's positive. "
            "Masks are cut at a half, since Train LoRA knows no shades. Use batch_size 1 there (with "
            "grad_accumulation_steps for more), bf16 or fp32, and pictures of one size.",
            is_input_list=True,
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The captions, one for each picture, or a single one for all.",
                ),
                io.Mask.Input(
                    "masks",
                    tooltip="One mask for each picture, in their order: white is learned.",
                ),
                io.Latent.Input(
                    "latents",
                    tooltip="The latents that Train LoRA gets. The masks are brought to their size.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    is_output_list=True,
                    tooltip="Connect it to Train LoRA's positive.",
                )
            ],
        )

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        conditioning: list[list[Caption]],
        masks: list[Tensor],
        latents: list[Mapping[str, Tensor]],
    ) -> io.NodeOutput:
        captions = [caption for of in conditioning for caption in of]
        samples = [sample for latent in latents for sample in latent["samples"]]
        found = [mask for batch in masks for mask in masks_of(batch)]
        with told_on_node() as told:
            for said in training_notices(cls.hidden.prompt or {}, str(cls.hidden.unique_id)):
                warnings.warn(said, Notice, stacklevel=2)
            positive = masked(captions, found, samples)
        return io.NodeOutput([positive], ui=on_node(*told))


def masked(
    captions: Sequence[Caption], masks: Sequence[Tensor], samples: Sequence[Tensor]
) -> list[Caption]:
    """Return the captions, each with the mask of its picture at the size of its latent.

    Args:
        captions: one for each picture, or a single one for all.
        masks: [h, w] in 0..1 each.
        samples: latents [c, ..., h, w].

    Raises:
        UserError: their numbers do not match.
    """
    if len(masks) != len(samples) or len(captions) not in (1, len(masks)):
        raise UserError(
            f"Bad number of masks or captions. Expected {len(samples)} masks, one for each latent, and as many "
            f"captions or a single one; got {len(masks)} masks and {len(captions)} captions."
        )
    sizes = [(sample.shape[-2], sample.shape[-1]) for sample in samples]
    labels = [cut(resize(m, size, "mask")) for m, size in zip(masks, sizes, strict=True)]
    say_odd(masks, labels)
    if len(set(sizes)) > 1:
        warnings.warn(
            f"The latents have {len(set(sizes))} sizes. Train LoRA brings all masks to the first one's, so the "
            "others are wrong: train pictures of one size at a time.",
            Notice,
            stacklevel=2,
        )
    repeated = [*captions] * (len(masks) if len(captions) == 1 else 1)
    return [
        [
            text,
            {**told, "mask": one[None].float(), "set_area_to_bounds": False, "mask_strength": 1.0},
        ]
        for (text, told), one in zip(repeated, labels, strict=True)
    ]


def say_odd(masks: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
    """Say which masks are empty, inverted by their look, or have shades, which are cut."""
    odd = {
        "is empty at the latent's size, so nothing is learned of its picture": [
            not label.any() for label in labels
        ],
        "covers the border and not the middle. If it is inverted, put Invert Mask before this node": [
            looks_inverted(mask) for mask in masks
        ],
        "has shades, which are cut at a half": [
            bool(((mask > 0.02) & (mask < 0.98)).float().mean() > 0.1) for mask in masks
        ],
    }
    for what, found in odd.items():
        numbers = [str(number) for number, one in enumerate(found, start=1) if one]
        if numbers:
            warnings.warn(f"Mask {', '.join(numbers)} {what}.", Notice, stacklevel=3)


def training_notices(graph: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Return what is wrong with the settings of each Train LoRA behind a node, for masks to act.

    Args:
        graph: what is queued, in API format.
        name: of the node.
    """
    said = []
    for node in behind(graph, name):
        inputs = graph[node].get("inputs", {})
        if graph[node].get("class_type") != TRAIN:
            continue
        batch = inputs.get("batch_size")
        if isinstance(batch, int) and batch > 1:
            said.append(
                f"Train LoRA's batch_size is {batch}, and it mixes the captions and masks of a batch. Set it "
                f"to 1, and grad_accumulation_steps to {batch}."
            )
        if inputs.get("training_dtype") == "none":
            said.append(
                "Train LoRA's training_dtype is 'none'. With a model in fp16, what a mask leaves out becomes "
                "NaN: choose bf16 or fp32."
            )
        if inputs.get("bucket_mode") is True:
            said.append(
                "Train LoRA's bucket_mode is on. It brings all masks to one size, which is wrong for all others: "
                "train pictures of one size at a time."
            )
    return said


def behind(graph: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """Return the nodes that depend on a node."""
    found, waiting = [], [name]
    while waiting:
        source = waiting.pop()
        for other, node in graph.items():
            if other not in found and any(str(link[0]) == source for link in links(node)):
                found.append(other)
                waiting.append(other)
    return found
