"""Which of ComfyUI's models can be learned on, and clear refusals of all others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SDXL, BaseModel
from comfy.model_sampling import EPS, V_PREDICTION, ModelSamplingDiscrete
from comfy.sd1_clip import SDClipModel, SDTokenizer

from ...em_core.errors import UserError
from ...em_core.model.schedules import Prediction, VariancePreserving

SUPPORTED = "Stable Diffusion 1.x, Stable Diffusion 2.x and SDXL checkpoints"
NAMES = {("clip_l",): "sd1", ("clip_h",): "sd2", ("clip_l", "clip_g"): "sdxl"}
TEXT_WIDTH = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
IMAGE_SIDE = {"sd1": 512, "sd2": 512, "sdxl": 1024}


@dataclass(frozen=True)
class GraphModels:
    """The MODEL, CLIP and VAE of a graph, identified once and then passed around.

    Attributes:
        model, clip, vae: the models as the graph provides them, with all patches.
        family: "sd1", "sd2", "sdxl", or "sd-<text width>" for a small model of the first kind.
        encoders: name of each text encoder, as in embedding files -> width of its token vectors.
        image_side: side, in pixels, of the pictures that the MODEL was made for.
        factor: how many times longer a picture's side is than its latent's.
        channels: number of channels of a latent.
    """

    model: Any
    clip: Any
    vae: Any
    family: str
    encoders: Mapping[str, int]
    image_side: int
    factor: int
    channels: int


def text_encoders(clip: Any) -> dict[str, SDClipModel]:
    """Map names to the text encoders, in the order in which their outputs are joined.

    Raises:
        UserError: the CLIP's family is not supported.
    """
    parts = {
        name: part
        for name, part in clip.cond_stage_model.named_children()
        if isinstance(part, SDClipModel)
    }
    known = tuple(name for name in ("clip_l", "clip_h", "clip_g") if name in parts)
    tokenized = all(isinstance(getattr(clip.tokenizer, name, None), SDTokenizer) for name in known)
    if known not in NAMES or len(parts) != len(known) or not tokenized:
        raise UserError(
            f"This CLIP is not supported. Expected the text encoders of {SUPPORTED}, got "
            f"{', '.join(parts) or 'a different kind'}. Load MODEL and CLIP from a supported checkpoint."
        )
    return {name: parts[name] for name in known}


def encoder_widths(clip: Any) -> dict[str, int]:
    """Map the text encoders' names to the widths of their token vectors.

    Raises:
        UserError: the CLIP's family is not supported.
    """
    return {
        name: encoder.transformer.get_input_embeddings().weight.shape[1]
        for name, encoder in text_encoders(clip).items()
    }


def require_unet(model: Any) -> None:
    """Refuse a MODEL that is not a UNet of a supported family.

    Raises:
        UserError: it has a different architecture, or is an inpainting or refiner variant.
    """
    base = model.model
    if type(base) not in (BaseModel, SDXL) or not isinstance(base.diffusion_model, UNetModel):
        raise UserError(
            f"This MODEL is not supported. Expected {SUPPORTED}, got {type(base).__name__}. "
            "Load a supported checkpoint."
        )
    if base.diffusion_model.in_channels != 4 or base.concat_keys:
        raise UserError(
            "This MODEL is an inpainting or image-editing variant "
            f"({base.diffusion_model.in_channels} input channels). Expected a plain text-to-image model. "
            "Load the plain checkpoint instead."
        )


def require_there(**parts: Any) -> None:
    """Refuse inputs that are empty: a checkpoint's loader gives nothing for what the file lacks.

    Raises:
        UserError: there is such an input; the message says which node loads the part alone.
    """
    loaders = {"model": "Load Diffusion Model", "clip": "Load CLIP", "vae": "Load VAE"}
    for name, part in parts.items():
        if part is None or (name == "vae" and part.first_stage_model is None):
            raise UserError(
                f"The input '{name}' is empty, because the checkpoint that was loaded has no "
                f"{name.upper()}. Connect one of the same family from the node {loaders[name]}, or load a "
                "checkpoint that has all parts."
            )


def require_vae(model: Any, vae: Any) -> None:
    """Refuse a VAE whose latents are not the MODEL's.

    Raises:
        UserError: it has another number of channels, or is one for videos.
    """
    expected = model.model.latent_format.latent_channels
    if vae.latent_channels != expected or vae.latent_dim != 2:
        kind = " and for videos" * (vae.latent_dim == 3)
        raise wrong_vae(expected, f"one with {vae.latent_channels}{kind}")


def wrong_vae(channels: int, found: str) -> UserError:
    return UserError(
        f"This VAE is of a different family. Expected one for pictures with {channels} latent channels, as "
        f"the MODEL has, got {found}. Connect the VAE of the MODEL's checkpoint."
    )


def require_no_hooks(clip: Any) -> None:
    """Refuse a CLIP with hooks, which act through the conditionings that samplers get.

    Raises:
        UserError: it has hooks.
    """
    if clip.patcher.forced_hooks is not None:
        raise UserError(
            "This CLIP has hooks that belong to its conditionings (Set CLIP Hooks), which this node does not run. "
            "Connect the CLIP from before that node; for drawing, leave the node where it is."
        )


def identify(model: Any, clip: Any, vae: Any) -> GraphModels:
    """Identify a graph's models and check that they belong together.

    Raises:
        UserError: one is missing or not supported, or they do not belong together.
    """
    require_there(model=model, clip=clip, vae=vae)
    require_no_hooks(clip)
    require_unet(model)
    widths = encoder_widths(clip)
    read = next(
        module.to_k.weight.shape[1]
        for name, module in model.model.diffusion_model.named_modules()
        if name.endswith("attn2")
    )
    given = sum(widths.values())
    if read != given:
        raise UserError(
            f"MODEL and CLIP are from different families. Expected text vectors of width {read}, which the "
            f"MODEL reads, got {given} from the CLIP. Load both from one checkpoint."
        )
    require_vae(model, vae)
    family, side = family_of(model, widths)
    factor = int(vae.spacial_compression_encode())
    channels = int(model.model.latent_format.latent_channels)
    return GraphModels(model, clip, vae, family, widths, side, factor, channels)


def family_of(model: Any, widths: Mapping[str, int]) -> tuple[str, int]:
    """Return the family's name and the side, in pixels, of the pictures that the MODEL was made for."""
    name, width = NAMES[tuple(widths)], sum(widths.values())
    if name == "sd1" and width != TEXT_WIDTH[name]:
        return f"sd-{width}", 64
    side = 768 if name == "sd2" and prediction(model) == "v_prediction" else IMAGE_SIDE[name]
    return name, side


def prediction(model: Any) -> Prediction:
    """Return what the MODEL predicts under the sampling that the graph has set on it.

    Raises:
        UserError: it predicts neither noise nor v on the usual discrete schedule.
    """
    sampling = model.get_model_object("model_sampling")
    known: dict[Any, Prediction] = {
        EPS.calculate_denoised: "epsilon",
        V_PREDICTION.calculate_denoised: "v_prediction",
    }
    predicted = known.get(type(sampling).calculate_denoised)
    if predicted is None or not isinstance(sampling, ModelSamplingDiscrete):
        raise UserError(
            "This MODEL's sampling is not supported. Expected eps or v-prediction on the usual discrete "
            "schedule, not EDM, LCM or flow. Connect the MODEL from before the ModelSampling node to this one, and "
            "leave that node where it is for drawing; or load another checkpoint."
        )
    return predicted


def noise_schedule(model: Any) -> VariancePreserving:
    """Return the MODEL's forward process, with alpha_bar = 1 / (1 + sigma^2)."""
    sigmas = model.get_model_object("model_sampling").sigmas
    # The buffer moves with the model, and a Mac's device has no float64.
    alphas = 1 / (1 + sigmas.detach().cpu().double() ** 2)
    return VariancePreserving(alphas.float(), prediction(model))


def require_plain_weights(module: torch.nn.Module, what: str) -> None:
    """Refuse weights that have no gradient: quantised ones and other packs' own formats.

    Plain fp32, fp16, bf16 and fp8 weights pass.

    Raises:
        UserError: there are such weights; the message names their format.
    """
    for name, weight in module.named_parameters():
        if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
            raise UserError(
                f"The {what} has quantised weights (GGUF, NF4 or another format). Expected fp32, fp16, bf16 or "
                f"plain fp8, got {type(weight.data).__name__} of type {weight.dtype} at {name}. Load the "
                "checkpoint unquantised."
            )
    scaled = ("scale_weight", "weight_scale")
    if any(getattr(part, name, None) is not None for part in module.modules() for name in scaled):
        raise UserError(
            f"The {what} has scaled fp8 weights. Expected fp32, fp16, bf16 or plain fp8. Load the checkpoint "
            "in one of these formats."
        )
