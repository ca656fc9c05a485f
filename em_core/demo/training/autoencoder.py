"""Training of the KL autoencoder: 64 x 64 pixels to latents of 4 x 16 x 16.

Plain L1 loses the objects' colours at this size, so their pixels weigh more and colours averaged
over 4 x 4 pixels are compared as well.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from .checkpoint import Checkpoint
from .data import SceneTable, open_table
from .loop import Parts, Round, optimise, reporter
from .schedule import AveragedWeights, Log, lay_out_channels_last


@dataclass(frozen=True)
class AutoencoderSettings:
    """What the autoencoder's loss weighs.

    `recoloured` is the share of pictures with shuffled colour channels. `squared` errors are those
    of PSNR.
    """

    object_weight: float = 5.0
    colour_weight: float = 1.0
    kl_weight: float = 1e-4
    recoloured: float = 0.2
    squared: bool = False


def new_autoencoder() -> AutoencoderKL:
    """The autoencoder's topology: f = 4, 4 latent channels, attention in the middle."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=64,
    )
    # The posterior starts narrow: at deviation 1 its noise would drown the untrained means.
    with torch.no_grad():
        model.quant_conv.bias[4:] = -4.0
    return model


def to_tensor(images: UInt8[ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures of values 0 to 255 as tensors of values -1 to 1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(
    table: SceneTable, rng: np.random.Generator, count: int, recoloured: float
) -> tuple[Float[Tensor, "b 3 64 64"], Float[Tensor, "b 1 64 64"]]:
    """Random pictures, flipped at random and some with their colour channels shuffled; objects."""
    index = np.sort(rng.integers(0, len(table), count))
    x = to_tensor(table.images[index])
    inside = torch.from_numpy(table.labels[index] > 0).float()[:, None]
    for b in range(len(x)):
        if rng.random() < recoloured:
            x[b] = x[b, torch.from_numpy(rng.permutation(3))]
        axes = [axis for axis in (1, 2) if rng.random() < 0.5]
        x[b], inside[b] = x[b].flip(axes), inside[b].flip(axes)
    return x, inside


def picture_loss(
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    inside: Float[Tensor, "b 1 h w"],
    settings: AutoencoderSettings,
) -> Float[Tensor, ""]:
    """Weighted squared error, or weighted L1 of pixels and of colours averaged over 4 x 4 pixels."""
    weight = 1 + (settings.object_weight - 1) * inside
    if settings.squared:
        return 10 * (weight * (x - y).square()).sum() / (3 * weight.sum())
    coarse_weight = F.avg_pool2d(weight, 4)
    fine = (weight * (x - y).abs()).sum() / (3 * weight.sum())
    coarse = coarse_weight * F.avg_pool2d(x - y, 4).abs()
    return fine + settings.colour_weight * coarse.sum() / (3 * coarse_weight.sum())


def kl_loss(mean: Float[Tensor, "b 4 i j"], logvar: Float[Tensor, "b 4 i j"]) -> Float[Tensor, ""]:
    """KL divergence of the posterior from N(0, 1), per latent value."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def full_loss(
    model: AutoencoderKL, x: Tensor, inside: Tensor, settings: AutoencoderSettings
) -> Float[Tensor, ""]:
    """Loss of a picture batch through encoder, sampled latents and decoder."""
    posterior = model.encode(x).latent_dist
    z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
    kl = kl_loss(posterior.mean, posterior.logvar)
    return picture_loss(x, model.decode(z).sample, inside, settings) + settings.kl_weight * kl


def train_autoencoder(
    rank: int,
    data: Path,
    out: Path,
    log_path: Path,
    round_: Round,
    settings: AutoencoderSettings,
    checkpoint: Checkpoint,
) -> None:
    """One process of a round, which goes on from `out` where that exists and writes there."""
    torch.manual_seed(round_.seed + 1000 * rank)
    table, log = open_table(data), Log(log_path)
    model = AutoencoderKL.from_pretrained(out) if out.exists() else new_autoencoder()
    model.train().float()
    lay_out_channels_last(model)
    average = AveragedWeights(model, round_.average)
    shipped: Any = average.module

    def step_loss(step: int) -> tuple[Tensor, Parts]:
        rng = np.random.default_rng([round_.seed, rank, step])
        torch.manual_seed(int(rng.integers(2**62)))
        loss = full_loss(
            model, *draw_batch(table, rng, round_.batch, settings.recoloured), settings
        )
        return loss, {"loss": float(loss.detach())}

    def after(step: int) -> None:
        if rank == 0 and step % 500 == 0:
            keep(step)

    def keep(step: int) -> None:
        log.write(part="autoencoder", step=step, **quality(shipped, table, slice(0, 64)))
        shipped.save_pretrained(out)

    samples = round_.batch * dist.get_world_size()
    report = reporter(log, "autoencoder", rank, samples)
    optimise(model, average, round_, step_loss, after, report, checkpoint)
    if rank == 0:
        keep(round_.steps)


@torch.no_grad()
def quality(model: Any, table: SceneTable, rows: slice) -> dict[str, float]:
    """PSNR in dB over all pixels and over the objects' pixels, and the latents' deviation."""
    x = to_tensor(table.images[rows])
    inside = torch.from_numpy(table.labels[rows] > 0)[:, None]
    z = model.encode(x).latent_dist.mean
    error = (model.decode(z).sample.clamp(-1, 1) - x).square() / 4
    on_objects = float(error.mean(1, keepdim=True)[inside].mean())
    return {
        "psnr": round(-10 * math.log10(float(error.mean())), 2),
        "psnr_objects": round(-10 * math.log10(on_objects), 2),
        "latent_std": round(float(z.std()), 4),
    }
