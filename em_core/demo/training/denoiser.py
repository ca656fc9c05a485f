"""Joint training of the UNet and the text encoder: noise prediction with an attention teacher."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .. import vocabulary
from .batches import LENGTH, Batch, Batches, compact_ids
from .checkpoint import Checkpoint
from .data import open_table
from .export import export_model, load_weights
from .loop import LossOf, Parts, Round, optimise, reporter
from .schedule import AveragedWeights, Log, lay_out_channels_last
from .teacher import TaughtColumns, attention_loss, teach


@dataclass(frozen=True)
class DenoiserSettings:
    """What the loss of UNet and text encoder weighs.

    `snr_limit` and `noisy_limit` bound the weights of clear and of noisy steps (`snr_weight`),
    `mean_weight` and `coarse_weight` are those of the coarse errors (`coarse_error`),
    `teacher_weight` is that of the attention loss on nouns and `ground_weight` the share of it
    that the background's word gets. `export_every` counts steps between whole model folders.
    """

    snr_limit: float = 5.0
    noisy_limit: float = 15.0
    mean_weight: float = 1.0
    coarse_weight: float = 0.1
    teacher_weight: float = 0.1
    ground_weight: float = 0.3
    export_every: int = 1000


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.x topology: cross-attention at 16 x 16 and 8 x 8, heads 32 wide."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        norm_num_groups=32,
    )


def new_text_encoder(rows: int) -> CLIPTextModel:
    """CLIP's text topology with `rows` token embeddings; start, end and padding come last."""
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        projection_dim=64,
        bos_token_id=rows - 2,
        eos_token_id=rows - 1,
        pad_token_id=rows - 1,
    )
    return CLIPTextModel(config)


def noise_schedule() -> Float[Tensor, "1000"]:
    """alpha_bar of the scaled-linear schedule of Stable Diffusion (0.00085 to 0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def stratified_steps(count: int, rng: torch.Generator) -> Int[Tensor, " b"]:
    """One timestep from each of `count` equal parts of 0 to 999, shuffled."""
    parts = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return (parts * 1000).long().clamp_max(999)[torch.randperm(count, generator=rng)]


def snr_weight(
    snr: Float[Tensor, " b"], snr_limit: float, noisy_limit: float
) -> Float[Tensor, " b"]:
    """Weights of the noise's error, by signal-to-noise ratio (SNR).

    Above SNR 1: min(SNR, limit) / SNR (Hang 2023, "Min-SNR", Eq. 7). Below: 1 / SNR up to another
    limit (truncated SNR; Salimans 2022, 4), since there the layout and the background are decided
    while the error of the noise is small.
    """
    clear = snr.clamp_max(snr_limit) / snr
    return torch.where(snr > 1, clear, (1 / snr).clamp_max(noisy_limit))


def coarse_error(
    error: Float[Tensor, "b 4 16 16"], snr: Float[Tensor, " b"], side: int
) -> Float[Tensor, " b"]:
    """Squared error of the denoised latent averaged over parts of a `side` x `side` grid.

    A loss at coarser scales as well (Hoogeboom 2023, "simple diffusion", 3.2). Noise prediction
    needs it here: at the first steps an error of the noise's mean is magnified 15 times in the
    picture's mean, which is the background, and in the plain loss it hardly counts.
    """
    coarse = F.adaptive_avg_pool2d(error, side).square().mean(dim=(1, 2, 3))
    return coarse / snr


class Objective:
    """The training loss of a batch."""

    def __init__(self, model: nn.ModuleDict, settings: DenoiserSettings) -> None:
        self.unet, self.text, self.settings = model["unet"], model["text"], settings
        self.alpha_bar = noise_schedule()
        self.taught = teach(self.unet)

    def __call__(self, batch: Batch, eps: Tensor, t: Int[Tensor, " b"]) -> tuple[Tensor, Parts]:
        """Weighted error of the noise plus the attention loss, and its parts."""
        alpha = self.alpha_bar[t]
        columns = TaughtColumns(batch.select)
        difference = self._predict(batch, eps, t, columns) - eps
        error = difference.square().mean(dim=(1, 2, 3))
        s, snr = self.settings, alpha / (1 - alpha)
        weighted = snr_weight(snr, s.snr_limit, s.noisy_limit) * error
        mean = coarse_error(difference, snr, 1).mean()
        coarse = coarse_error(difference, snr, 4).mean()
        seen = batch.weight * alpha.sqrt()[:, None]
        taught = attention_loss(columns.maps, batch.target, seen)
        loss = weighted.mean() + s.teacher_weight * taught
        loss = loss + s.mean_weight * mean + s.coarse_weight * coarse
        values = (weighted.mean(), error.mean(), taught, mean, coarse)
        names = ("loss", "noise_error", "attention_error", "mean_error", "coarse_error")
        return loss, {n: float(v.detach()) for n, v in zip(names, values, strict=True)}

    def _predict(self, batch: Batch, eps: Tensor, t: Tensor, columns: TaughtColumns) -> Tensor:
        a = self.alpha_bar[t][:, None, None, None]
        for processor in self.taught:
            processor.columns = columns
        y = self.text(batch.tokens).last_hidden_state
        z_t = (a.sqrt() * batch.z + (1 - a).sqrt() * eps).to(memory_format=torch.channels_last)
        return self.unet(z_t, t, y, return_dict=False)[0]


def train_denoiser(
    rank: int,
    work: Path,
    tokenizer: Path,
    start: Path | None,
    out: Path,
    log_path: Path,
    round_: Round,
    settings: DenoiserSettings,
    checkpoint: Checkpoint,
) -> None:
    """One process of a round that goes on from the model folder `start`; writes folder `out`."""
    torch.manual_seed(round_.seed + 1000 * rank)
    ids = vocabulary.read_ids(tokenizer)
    model = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(len(ids_of_words()))})
    lay_out_channels_last(model)
    model.train()
    if start is not None:
        load_weights(model, start, ids)
    average = AveragedWeights(model, round_.average)
    batches = Batches(
        open_table(work / "data"), work / "latents.npy", compact_ids(ids), settings.ground_weight
    )
    draw = _drawer(batches, Objective(model, settings), round_, rank)

    def after(step: int) -> None:
        if rank == 0 and step % settings.export_every == 0:
            export_model(average.module, ids, work / "vae", tokenizer, out)

    samples = round_.batch * dist.get_world_size()
    report = reporter(Log(log_path), "denoiser", rank, samples)
    optimise(model, average, round_, draw, after, report, checkpoint)
    if rank == 0:
        export_model(average.module, ids, work / "vae", tokenizer, out)


def ids_of_words() -> tuple[str, ...]:
    """Names of the compact token table's rows."""
    return (*vocabulary.WORDS, vocabulary.START_PIECE, vocabulary.END_PIECE)


def _drawer(batches: Batches, objective: Objective, round_: Round, rank: int) -> LossOf:
    """The loss of a random batch, which the step's number decides."""

    def draw(step: int) -> tuple[Tensor, Parts]:
        rng = np.random.default_rng([round_.seed, 77, rank, step])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        index = rng.integers(0, len(batches.latents), round_.batch)
        batch = batches.draw(index, rng)
        t = stratified_steps(round_.batch, noise)
        return objective(batch, torch.randn(batch.z.shape, generator=noise), t)

    return draw
