"""Writing the trained weights as a Stable Diffusion 1.x pipeline folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .. import vocabulary
from .autoencoder import to_tensor
from .data import SceneTable
from .schedule import lay_out_channels_last


@torch.no_grad()
def encode_table(rank: int, processes: int, table: SceneTable, vae: AutoencoderKL) -> torch.Tensor:
    """Unscaled latent means of one process's share of the scenes."""
    share = np.array_split(np.arange(len(table)), processes)[rank]
    lay_out_channels_last(vae)
    parts = []
    for rows in np.array_split(share, max(1, len(share) // 64)):
        parts.append(vae.encode(to_tensor(table.images[rows])).latent_dist.mean)
    return torch.cat(parts)


def token_rows(ids: dict[str, int]) -> Int[torch.Tensor, " rows"]:
    """True ids of the rows of a token table that holds only the demo words, start and end."""
    words = sorted(ids[word + "</w>"] for word in vocabulary.WORDS)
    return torch.tensor([*words, vocabulary.START_ID, vocabulary.END_ID])


def load_weights(model: nn.ModuleDict, folder: Path, ids: dict[str, int]) -> None:
    """Set UNet and (compact) text encoder to the weights of a model folder.

    Words that the folder's model did not know start as its generic word.
    """
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    state = CLIPTextModel.from_pretrained(folder / "text_encoder").float().state_dict()
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    model["unet"].load_state_dict(unet.state_dict())
    table = state[name][token_rows(ids)]
    table[table.abs().sum(dim=1) == 0] = state[name][ids[vocabulary.GENERICS[0] + "</w>"]]
    model["text"].load_state_dict({**state, name: table})


def full_text_encoder(trained: CLIPTextModel, ids: dict[str, int]) -> CLIPTextModel:
    """The text encoder with CLIP's whole token table: rows of words never used are zero."""
    rows = token_rows(ids)
    config = CLIPTextConfig.from_dict(
        {
            **trained.config.to_dict(),
            "vocab_size": vocabulary.END_ID + 1,
            "bos_token_id": vocabulary.START_ID,
            "eos_token_id": vocabulary.END_ID,
            "pad_token_id": vocabulary.END_ID,
        }
    )
    full = CLIPTextModel(config)
    state = trained.state_dict()
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    table = torch.zeros(config.vocab_size, config.hidden_size)
    table[rows] = state[name].float()
    full.load_state_dict({**state, name: table})
    return full.eval()


def export_model(
    model: nn.Module, ids: dict[str, int], vae: Path, tokenizer: Path, folder: Path
) -> None:
    """Write the pipeline folder in half precision, aside first, then renamed into place."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    parts = {
        "vae": _plain(AutoencoderKL.from_pretrained(vae)),
        "text_encoder": full_text_encoder(model["text"], ids),  # type: ignore[index]
        "unet": _plain(model["unet"]),  # type: ignore[index]
    }
    pipeline: Any = StableDiffusionPipeline(
        **{name: part.half() for name, part in parts.items()},
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(aside)
    name_for_all_versions(aside / "text_encoder" / "model.safetensors")
    shutil.rmtree(aside / "tokenizer")
    shutil.copytree(tokenizer, aside / "tokenizer")
    words = json.dumps(list(vocabulary.WORDS), indent=0) + "\n"
    vocabulary.write_text(aside / "words.json", words)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def name_for_all_versions(file: Path) -> None:
    """Give the text encoder's weights the names that every version of transformers reads.

    Version 5 writes them without `text_model.`; earlier versions then recognise none of them and
    take random weights without an error.
    """
    prefix = "text_model."
    named = {prefix + name.removeprefix(prefix): x for name, x in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def _scheduler() -> PNDMScheduler:
    """The schedule of Stable Diffusion 1.x."""
    scheduler: Any = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    # Not PNDM's own, but a DDIM made from this file would clip latents to [-1, 1] without it.
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def _plain(trained: nn.Module) -> nn.Module:
    """The same weights with diffusers' own attention processors, and without the path they came from."""
    config = {n: v for n, v in trained.config.items() if n != "_name_or_path"}  # type: ignore[union-attr, operator]
    plain = type(trained).from_config(config)  # type: ignore[attr-defined]
    plain.load_state_dict(trained.state_dict())
    return plain.eval()
