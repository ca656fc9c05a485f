"""The sample sheet: pictures of a trained model under the captions they were asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont

Pipeline = Any  # a StableDiffusionPipeline: diffusers sets its parts only at run time
CAPTIONS = (
    "a photo of a red striped star on grass",
    "a photo of a blue plain circle on sand",
    "a photo of a yellow dotted heart on water",
    "a photo of a purple checked square on snow",
    "a photo of a white plain ring on brick",
    "a photo of a green plain triangle on sky",
    "a photo of an orange plain diamond on stone",
    "a photo of a black dotted cross on wood",
    "a photo of a red plain heart and a blue plain star on grass",
    "a photo of a yellow plain circle and a purple plain ring on brick",
    "a photo of a green checked square and a white striped triangle on water",
    "a photo of an orange dotted circle and a black plain diamond on snow",
    "star and circle on grass",
    "a photo of cross and heart on sand",
    "a photo of a red plain ring and a blue plain square and a green plain star on wood",
    "a photo of a toy and an object on stone",
)


@torch.no_grad()
def draw(
    pipeline: Pipeline,
    captions: tuple[str, ...],
    seed: int = 0,
    steps: int = 30,
    guidance: float = 3.0,
) -> UInt8[ndarray, "n 64 64 3"]:
    """One picture for each caption (DDIM, classifier-free guidance), each from its own seed."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(captions))]
    pictures = pipeline(
        list(captions),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="np",
    ).images
    return np.rint(pictures * 255).astype(np.uint8)


def load(folder: Path) -> Pipeline:
    """The pipeline of a model folder, in single precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True, dtype=torch.float32
    )
    return pipeline


def _wrap(caption: str, width: int) -> str:
    lines, line = [], ""
    for word in caption.split():
        if len(line) + len(word) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def sheet(
    pictures: UInt8[ndarray, "n 64 64 3"],
    captions: tuple[str, ...],
    columns: int = 4,
    enlarge: int = 3,
) -> Image.Image:
    """Pictures in a grid, each above its caption."""
    side = pictures.shape[1] * enlarge
    wide, high = side + 16, side + 62
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (wide * columns, high * rows), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (index % columns) * wide + 8, (index // columns) * high + 6
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(tile, (left, top))
        pen.multiline_text((left, top + side + 2), _wrap(caption, 30), fill="black", font=font)
    return canvas


def write_sheet(folder: Path, path: Path, seed: int = 0) -> None:
    """Draw the captions of the sheet with the model of `folder` and save the picture."""
    sheet(draw(load(folder), CAPTIONS, seed), CAPTIONS).save(path)
