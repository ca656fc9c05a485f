"""Loading of Stable Diffusion pipelines, and refusals of what is none."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(source: Path | str) -> Any:
    """Load a Stable Diffusion pipeline from a folder, a .safetensors file, or a name on the model hub.

    Only safetensors weights are read; nothing is unpickled. A folder or file is read without a
    network; a model on the hub is downloaded by diffusers unless it is in its cache.

    Raises:
        UserError: diffusers is not installed, or the source holds no model that it can read.
    """
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise UserError(
            "Loading a model needs diffusers. Install it: pip install diffusers transformers"
        ) from error
    path, checker = Path(source), {"safety_checker": None, "requires_safety_checker": False}
    try:
        if path.is_dir():
            return StableDiffusionPipeline.from_pretrained(
                path, local_files_only=True, use_safetensors=True, **checker
            )
        if path.suffix == ".safetensors" and path.is_file():
            return StableDiffusionPipeline.from_single_file(str(path), local_files_only=True)
        if HUB_NAME.fullmatch(str(source)) and not path.exists():
            return StableDiffusionPipeline.from_pretrained(
                str(source), use_safetensors=True, **checker
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Could not load a Stable Diffusion 1.x or 2.x model from {source}: {error}. "
            "Expected a diffusers pipeline folder with safetensors weights, a .safetensors "
            "checkpoint, or the name of such a model on the hub (owner/name)."
        ) from error
    raise UserError(
        f"No model at {source}. Expected a diffusers pipeline folder (with model_index.json), "
        "a .safetensors checkpoint, or the name of a model on the hub (owner/name)."
    )


def require_plain_model(unet: Any, text_encoder: Any) -> None:
    """Refuse a UNet that takes more than noise, a timestep and one text encoder's output.

    Raises:
        UserError: the model is an inpainting model, SDXL, or of a different kind.
    """
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    text = text_encoder.get_input_embeddings().weight.shape[1]
    if channels != 4 or width != text:
        raise UserError(
            f"This is not a plain Stable Diffusion 1.x or 2.x model. Expected a UNet with 4 input channels "
            f"and the text encoder's width of {text}, got {channels} channels and a width of {width}. "
            "Use a model that is neither an inpainting model nor SDXL."
        )


def torch_device(name: str) -> torch.device:
    """Return the torch device of this name.

    Raises:
        UserError: this machine has no such device.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"No device {name!r} on this machine. Expected cpu, or cuda if it has an NVIDIA GPU."
        ) from error
