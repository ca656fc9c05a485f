"""Training of the KL autoencoder: 64 x 64 pixels to latents of 4 x 16 x 16.

Plain L1 loses the objects' colours at this size, so their pixels weigh more and colours averaged
over 4 x 4 pixels are compared as well.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from time import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from em_core.demo.training.data import SceneTable, open_table
from em_core.demo.training.parallel import agree, average_gradients, share_parameters
from em_core.demo.training.schedule import AveragedWeights, Log, cosine_rate


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained; `batch` is per process."""

    minutes: float = 10.0
    batch: int = 8
    rate: float = 1.5e-3
    object_weight: float = 5.0
    colour_weight: float = 1.0
    kl_weight: float = 1e-4
    recoloured: float = 0.2
    seed: int = 0
    compile: bool = False
    resume: bool = False


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
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batch(
    table: SceneTable, rng: np.random.Generator, settings: AutoencoderSettings
) -> tuple[Float[Tensor, "b 3 64 64"], Float[Tensor, "b 1 64 64"]]:
    """Random pictures, flipped at random and some with their colour channels shuffled; objects."""
    index = np.sort(rng.integers(0, len(table), settings.batch))
    x = to_tensor(table.images[index])
    inside = torch.from_numpy(table.labels[index] > 0).float()[:, None]
    for b in range(len(x)):
        if rng.random() < settings.recoloured:
            x[b] = x[b, torch.from_numpy(rng.permutation(3))]
        axes = [axis for axis in (1, 2) if rng.random() < 0.5]
        x[b], inside[b] = x[b].flip(axes), inside[b].flip(axes)
    return x, inside


def autoencoder_loss(
    x: Float[Tensor, "b 3 h w"],
    y: Float[Tensor, "b 3 h w"],
    inside: Float[Tensor, "b 1 h w"],
    mean: Float[Tensor, "b 4 i j"],
    logvar: Float[Tensor, "b 4 i j"],
    settings: AutoencoderSettings,
) -> Float[Tensor, ""]:
    """Weighted L1, the same on colours averaged over 4 x 4 pixels, and the KL term (per value)."""
    weight = 1 + (settings.object_weight - 1) * inside
    fine = (weight * (x - y).abs()).sum() / (3 * weight.sum())
    coarse_weight = F.avg_pool2d(weight, 4)
    coarse = (coarse_weight * F.avg_pool2d(x - y, 4).abs()).sum() / (3 * coarse_weight.sum())
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return fine + settings.colour_weight * coarse + settings.kl_weight * kl


def train_autoencoder(
    rank: int, data: Path, out: Path, log_path: Path, settings: AutoencoderSettings
) -> None:
    """One process of the training; process 0 writes the averaged weights to `out`."""
    torch.manual_seed(settings.seed + 1000 * rank)
    rng = np.random.default_rng([settings.seed, rank])
    table, log = open_table(data), Log(log_path)
    model = AutoencoderKL.from_pretrained(out) if settings.resume else new_autoencoder()
    model.train()
    share_parameters(model.parameters())
    average = AveragedWeights(model, 0.995)
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, (0.9, 0.99), weight_decay=0.0)

    def loss_of(x: Tensor, inside: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            y = model.decode(posterior.mean + posterior.std * noise).sample
        parts = (y.float(), inside, posterior.mean.float(), posterior.logvar.float())
        return autoencoder_loss(x, *parts, settings)

    run = torch.compile(loss_of) if settings.compile else loss_of
    start, step, total = time(), 0, 0.0
    progress = 0.0
    while progress < 1:
        x, inside = _batch(table, rng, settings)
        loss = run(x, inside, torch.randn(len(x), 4, 16, 16))
        optimiser.zero_grad()
        loss.backward()
        average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = settings.rate * cosine_rate(progress, step)
        optimiser.step()
        average.update(model)
        step, total = step + 1, total + float(loss.detach())
        if step == 5:
            start = time()
        progress = agree((time() - start) / 60 / settings.minutes) if step > 5 else 0.0
        if step % 50 == 0 and rank == 0:
            log.write(part="autoencoder", step=step, samples=step * 2 * settings.batch,
                      loss=round(total / 50, 5))
        total = 0.0 if step % 50 == 0 else total
        if rank == 0 and (step % 500 == 0 or progress >= 1):
            values = quality(average.module, table, slice(0, 64))
            log.write(part="autoencoder", step=step, **values)
            average.module.save_pretrained(out)


@torch.no_grad()
def quality(model: AutoencoderKL, table: SceneTable, rows: slice) -> dict[str, float]:
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
