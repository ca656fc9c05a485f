"""Which of ComfyUI's models can be learned on, and clear refusals of the others."""

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
    """The MODEL, CLIP and VAE of a graph, identified once and then passed on.

    Attributes:
        model, clip, vae: as the graph gives them, with all patches.
        family: "sd1", "sd2", "sdxl", or "sd-<text width>" for a small model of the first kind.
        encoders: text encoder, as embedding files call it -> width of its token vectors.
        image_side: side in pixels of the pictures that the MODEL was made for.
        factor: pixels of a picture for each of its latent's, along a side.
        channels: of a latent.
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
    """Name -> text encoder, in the order in which their outputs are joined.

    Raises:
        UserError: the CLIP is of a family that is not supported.
    """
    parts = {
        name: part
        for name, part in clip.cond_stage_model.named_children()
        if isinstance(part, SDClipModel)
    }
    known = tuple(name for name in ("clip_l", "clip_h", "clip_g") if name in parts)
    tokenized = all(isinstance(getattr(clip.tokenizer, n, None), SDTokenizer) for n in known)
    if known not in NAMES or len(parts) != len(known) or not tokenized:
        raise UserError(
            f"This CLIP has the text encoders {', '.join(parts) or 'of another kind'}. "
            f"Expected those of {SUPPORTED}: load MODEL and CLIP from such a checkpoint."
        )
    return {name: parts[name] for name in known}


def encoder_widths(clip: Any) -> dict[str, int]:
    """Text encoder name -> width of its token vectors.

    Raises:
        UserError: the CLIP is of a family that is not supported.
    """
    return {
        name: encoder.transformer.get_input_embeddings().weight.shape[1]
        for name, encoder in text_encoders(clip).items()
    }


def require_unet(model: Any) -> None:
    """Refuse a MODEL that is no UNet of the supported families.

    Raises:
        UserError: it is another architecture, or an inpainting or refiner variant.
    """
    base = model.model
    if type(base) not in (BaseModel, SDXL) or not isinstance(base.diffusion_model, UNetModel):
        raise UserError(
            f"This MODEL is a {type(base).__name__}, which cannot be learned on. "
            f"Supported are {SUPPORTED}."
        )
    if base.diffusion_model.in_channels != 4 or base.concat_keys:
        raise UserError(
            "This MODEL is an inpainting or image-editing variant "
            f"({base.diffusion_model.in_channels} input channels). Load the plain checkpoint of it."
        )


def identify(model: Any, clip: Any, vae: Any) -> GraphModels:
    """What kind of models these are.

    Raises:
        UserError: one is not supported, or they do not belong together.
    """
    require_unet(model)
    widths = encoder_widths(clip)
    read = next(
        m.to_k.weight.shape[1]
        for n, m in model.model.diffusion_model.named_modules()
        if n.endswith("attn2")
    )
    given = sum(widths.values())
    if read != given:
        raise UserError(
            f"MODEL and CLIP are of different families: the MODEL reads text vectors of width {read}, "
            f"the CLIP gives {given}. Load both from one checkpoint."
        )
    family, side = family_of(model, widths)
    factor = int(vae.spacial_compression_encode())
    channels = int(model.model.latent_format.latent_channels)
    return GraphModels(model, clip, vae, family, widths, side, factor, channels)


def family_of(model: Any, widths: Mapping[str, int]) -> tuple[str, int]:
    """Name of the family, and the side of the pictures that the MODEL was made for."""
    name, width = NAMES[tuple(widths)], sum(widths.values())
    if name == "sd1" and width != TEXT_WIDTH[name]:
        return f"sd-{width}", 64
    side = 768 if name == "sd2" and prediction(model) == "v_prediction" else IMAGE_SIDE[name]
    return name, side


def prediction(model: Any) -> Prediction:
    """What the MODEL predicts, with the sampling that the graph has set on it.

    Raises:
        UserError: neither noise nor v on the usual discrete schedule.
    """
    sampling = model.get_model_object("model_sampling")
    ways: dict[Any, Prediction] = {
        EPS.calculate_denoised: "epsilon",
        V_PREDICTION.calculate_denoised: "v_prediction",
    }
    way = ways.get(type(sampling).calculate_denoised)
    if way is None or not isinstance(sampling, ModelSamplingDiscrete):
        raise UserError(
            "This MODEL's sampling is neither eps nor v-prediction on the usual discrete schedule "
            "(EDM, LCM and flow models are not supported). Remove the ModelSampling node before it, "
            "or load another checkpoint."
        )
    return way


def noise_schedule(model: Any) -> VariancePreserving:
    """The MODEL's forward process: alpha_bar = 1 / (1 + sigma^2)."""
    sigmas = model.get_model_object("model_sampling").sigmas
    alphas = 1 / (1 + sigmas.detach().clone().double() ** 2)
    return VariancePreserving(alphas.float(), prediction(model))


def require_plain_weights(module: torch.nn.Module, what: str) -> None:
    """Refuse weights that have no gradient: quantised ones and those of other packs' own formats.

    Raises:
        UserError: names the format; plain fp32, fp16, bf16 and fp8 weights pass.
    """
    for name, p in module.named_parameters():
        if type(p.data) is not torch.Tensor or not p.is_floating_point():
            raise UserError(
                f"The {what} has {type(p.data).__name__} weights of type {p.dtype} (GGUF, NF4 or another "
                f"quantised format, at {name}). Learning needs fp32, fp16, bf16 or plain fp8 weights: "
                "load the checkpoint unquantised."
            )
    scaled = ("scale_weight", "weight_scale")
    if any(getattr(m, name, None) is not None for m in module.modules() for name in scaled):
        raise UserError(
            f"The {what} has scaled fp8 weights. Learning needs fp32, fp16, bf16 or plain fp8 weights."
        )
