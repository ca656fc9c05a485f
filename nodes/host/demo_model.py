"""The demo model, built from ComfyUI's own UNet, CLIP and autoencoder classes."""

import json
import re
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from comfy import diffusers_convert, latent_formats, supported_models_base
from comfy.model_detection import convert_config
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SD1CheckpointClipModel, SD1ClipModel, SD1Tokenizer
from safetensors.torch import load_file
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.exchange.triggers import RARE
from ...em_core.prompts import MARK, require_known
from .text import refuse_unknown

NO_WORDS = re.compile(r"<[^<>]*>|embedding:\S+")
BLOCK = re.compile(r"(up_blocks)\.(\d)")


def demo_latents(scale: float) -> latent_formats.LatentFormat:
    """Return the format of the demo autoencoder's latents, which have their own scale."""
    latents = latent_formats.LatentFormat()
    latents.scale_factor = scale
    return latents


class DemoModel(supported_models_base.BASE):
    """The demo model's description, as ComfyUI expects it."""

    unet_extra_config: dict = {}  # noqa: RUF012
    supported_inference_dtypes = [torch.float32]  # noqa: RUF012


class DemoTokenizer(SD1Tokenizer):
    """CLIP's tokenizer, but it refuses words that the demo model was never shown."""

    known_words: frozenset[str] = frozenset()

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        concepts = getattr(self.clip_l, "concepts", {})
        for mark in MARK.finditer(text):
            name = mark[1].partition(":")[0].strip()
            if name not in concepts:
                refuse_unknown(mark[0], name, concepts)
        require_known(NO_WORDS.sub(" ", text), self.known_words, RARE)
        return super().tokenize_with_weights(text, *args, **kwargs)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Read the weights of one part of the model in float32."""
    (file,) = folder.glob("*.safetensors")
    return {name: weight.float() for name, weight in load_file(file).items()}


def load_demo_model(folder: Path) -> tuple[Any, Any, Any]:
    """Load MODEL, CLIP and VAE from the demo model's diffusers pipeline folder.

    Raises:
        UserError: the folder does not hold the model.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"The demo model is missing. Expected it in {folder}. Install the pack again."
        )
    with torch.inference_mode(False):
        return load_model(folder), load_clip(folder), load_vae(folder / "vae")


def load_model(folder: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """Load the UNet as a MODEL.

    ComfyUI passes `disable_dynamic` to ask for a fresh MODEL; this one always is.
    """
    config = unet_config(read_json(folder / "unet" / "config.json"))
    vae = read_json(folder / "vae" / "config.json")
    demo = DemoModel(config)
    demo.latent_format = demo_latents(vae["scaling_factor"])
    demo.set_inference_dtype(torch.float32, None)
    base = demo.get_model({}, device=mm.unet_offload_device())
    names = comfy.utils.unet_to_diffusers(demo.unet_config)
    weights = weights_of(folder / "unet")
    base.diffusion_model.load_state_dict({names[name]: weight for name, weight in weights.items()})
    patcher = ModelPatcher(
        base, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )
    patcher.cached_patcher_init = (load_model, (folder,))
    return patcher


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the config of a diffusers UNet of Stable Diffusion 1.x topology into ComfyUI's terms."""
    widths = config["block_out_channels"]
    heads = config["attention_head_dim"]  # the number of heads, in spite of its name
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    sizes = {width // count for width, count in zip(widths, heads, strict=True)}
    head_options = {"num_heads": -1, "num_head_channels": sizes.pop()} if len(sizes) == 1 else {
        "num_heads": heads[0], "num_head_channels": -1,
    }  # fmt: skip
    return convert_config(
        {
            "image_size": 32,
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "attention_resolutions": [2**level for level in range(len(widths))],
            "transformer_depth": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": config["use_linear_projection"],
            "context_dim": config["cross_attention_dim"],
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "legacy": False,
            **head_options,
        }
    )


def load_clip_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    """Load the text encoder's patcher anew, as ComfyUI asks of whoever loaded it."""
    return load_clip(folder, disable_dynamic).patcher


def load_clip(folder: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Load the text encoder, with CLIP's own tokenizer, as a CLIP.

    Args:
        folder: of the demo model.
        disable_dynamic: keeps its weights from being paged, which newer ComfyUI does on a graphics card.

    Raises:
        UserError: weights are missing or unexpected.
    """
    config = read_json(folder / "text_encoder" / "config.json")
    words = read_json(folder / "words.json")

    class DemoClipModel(SD1CheckpointClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None
        ):
            # The stock class would read its configuration from ComfyUI's folder.
            super(SD1CheckpointClipModel, self).__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(config),
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    class DemoClip(SD1ClipModel):
        def __init__(
            self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None
        ):
            options = model_options or {}
            super().__init__(device, dtype, options, clip_model=DemoClipModel)

    class Tokenizer(DemoTokenizer):
        known_words = frozenset(words)

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(embedding_directory, tokenizer_data or {})
            self.clip_l.embedding_size = config["hidden_size"]

    import folder_paths

    target = supported_models_base.ClipTarget(Tokenizer, DemoClip)
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": weight
        for name, weight in weights_of(folder / "text_encoder").items()
    }
    weights["text_projection.weight"] = torch.eye(config["hidden_size"])
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": torch.float32},
        **({"disable_dynamic": True} if disable_dynamic else {}),
    )
    clip.patcher.cached_patcher_init = (load_clip_patcher, (folder,))
    missing, unexpected = clip.cond_stage_model.clip_l.transformer.load_state_dict(
        weights, strict=False
    )
    if missing or unexpected:
        raise UserError(
            "The demo model's text encoder does not have the expected weights "
            f"({missing or unexpected}). Install the pack again."
        )
    return clip


def load_vae(folder: Path) -> comfy.sd.VAE:
    """Load the autoencoder as a VAE."""
    config = read_json(folder / "config.json")
    widths = config["block_out_channels"]
    levels = len(widths)
    # ComfyUI's conversion numbers the up blocks as if there were four.
    shift = 4 - levels
    weights = {
        BLOCK.sub(lambda found: f"{found[1]}.{int(found[2]) + shift}", name): weight
        for name, weight in weights_of(folder).items()
    }
    description = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": description, "embed_dim": config["latent_channels"]}
    vae = comfy.sd.VAE(
        sd=diffusers_convert.convert_vae_state_dict(weights),
        config={"params": params},
        dtype=torch.float32,
    )
    factor = 2 ** (levels - 1)
    vae.downscale_ratio = vae.upscale_ratio = factor
    return vae
