"""Loading of Stable Diffusion pipelines, and refusals of what is none."""

import json
import re
import warnings
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import UserError
from ..model.schedules import Prediction

SDXL = "StableDiffusionXL"
AUTO = "auto"
DTYPES = {
    AUTO: None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
AS_READ = torch.float16
"""In which weights are read that then rest in a narrower type; checkpoints hold hardly anything wider."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_pipeline(source: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a Stable Diffusion pipeline from a folder, a .safetensors file, or a name on the model hub.

    Only safetensors weights are read; nothing is unpickled. A folder or file is read without a
    network; a model on the hub is downloaded by diffusers unless it is in its cache.

    Raises:
        UserError: diffusers is not installed, or the source holds no model that it can read.
    """
    require_diffusers()
    try:
        with warnings.catch_warnings():
            # Newer versions of diffusers would have `dtype`, which older ones do not know.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = read_pipeline(source, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Could not load a Stable Diffusion 1.x, 2.x or SDXL model from {source}: {error}. "
            "Expected a diffusers pipeline folder with safetensors weights, a .safetensors "
            "checkpoint, or the name of such a model on the hub (owner/name)."
        ) from error
    if pipeline is not None:
        return pipeline
    raise UserError(
        f"No model at {source}. Expected a diffusers pipeline folder (with model_index.json), "
        "a .safetensors checkpoint, or the name of a model on the hub (owner/name)."
    )


def words_of(source: Path | str) -> frozenset[str] | None:
    """Return the words that a model knows, from its folder's `words.json`; None is all there are."""
    file = Path(source) / "words.json"
    return frozenset(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def rest_in(module: nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Cast a module's weights one by one: those with two axes and more to `storage`, others to
    `compute`, in which it works."""
    for weight in module.parameters():
        weight.data = weight.data.to(storage if weight.ndim > 1 else compute)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(compute) if buffer.is_floating_point() else buffer.data


def require_diffusers() -> None:
    """Refuse to load a model without diffusers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Loading a model needs diffusers. Install it: pip install diffusers transformers"
        ) from error


def read_pipeline(source: Path | str, dtype: torch.dtype) -> Any:
    """Return the pipeline that diffusers reads from a folder, file or hub; None if it is none of these."""
    from diffusers import DiffusionPipeline

    path = Path(source)
    where: Path | str = source
    options: dict[str, Any] = {}
    if path.suffix == ".safetensors" and path.is_file():
        kind, _ = kind_of(SDXL if holds_sdxl(path) else "")
        return kind.from_single_file(str(path), local_files_only=True, torch_dtype=dtype)
    if path.is_dir():
        where, options = path, {"local_files_only": True}
    elif path.exists() or not HUB_NAME.fullmatch(str(source)):
        return None
    kind, extra = kind_of(DiffusionPipeline.load_config(where, **options).get("_class_name", ""))
    return kind.from_pretrained(where, use_safetensors=True, torch_dtype=dtype, **options, **extra)


def kind_of(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of diffusers that a pipeline is loaded as, and options that only it has.

    SDXL's refiner and inpainting models are loaded as SDXL too, and refused by what they are.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if name.startswith(SDXL):
        return StableDiffusionXLPipeline, {"add_watermarker": False}
    return StableDiffusionPipeline, {"safety_checker": None, "requires_safety_checker": False}


def holds_sdxl(checkpoint: Path) -> bool:
    """Return whether a checkpoint has SDXL's names, its refiner's included."""
    with safe_open(checkpoint, framework="pt") as file:
        return any(name.startswith("conditioner.embedders.") for name in file.keys())  # noqa: SIM118


def require_plain_model(pipeline: Any) -> None:
    """Refuse a UNet that takes more than noise, a timestep, text and, for SDXL, the picture's size.

    Raises:
        UserError: the model is an inpainting model, SDXL's refiner, of a different kind, or on a different
            schedule.
    """
    parts = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    encoders = [part for part in parts if part is not None]
    config = pipeline.unet.config
    text = sum(encoder.get_input_embeddings().weight.shape[1] for encoder in encoders)
    fitting = {1: (None, None), 2: (None, "text_time")}.get(len(encoders))
    told = (config.class_embed_type, config.addition_embed_type)
    if parts[0] is None or (config.in_channels, config.cross_attention_dim) != (4, text):
        raise UserError(
            "This is not a plain Stable Diffusion 1.x, 2.x or SDXL model. Expected a UNet with 4 input channels "
            f"and the width of its CLIP text encoders, {text}; got {config.in_channels} channels and a width of "
            f"{config.cross_attention_dim}. Use a model that is neither an inpainting model nor SDXL's refiner."
        )
    if told != fitting:
        raise UserError(
            f"This is not a plain Stable Diffusion 1.x, 2.x or SDXL model: its UNet wants {told} besides the text "
            f"of {len(encoders)} encoders. Expected {fitting}. Use a plain text-to-image model."
        )
    scheduler = pipeline.scheduler
    predicted, known = getattr(scheduler.config, "prediction_type", None), get_args(Prediction)
    if not hasattr(scheduler, "alphas_cumprod") or predicted not in known:
        raise UserError(
            f"This model's schedule is not supported. Expected one that predicts {' or '.join(known)} on "
            f"the usual discrete schedule, got {predicted} by {type(scheduler).__name__}. Use another model."
        )


def number_type(name: str, device: torch.device) -> torch.dtype:
    """Return the number type of this name; "auto" is bfloat16 on a card that computes in it, else float32.

    Raises:
        UserError: there is no such type.
    """
    if name not in DTYPES:
        raise UserError(f"No number type {name!r}. Expected one of {', '.join(DTYPES)}.")
    return DTYPES[name] or (torch.bfloat16 if has_bfloat16(device) else torch.float32)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device is a card that computes in bfloat16, and does not only imitate it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


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
