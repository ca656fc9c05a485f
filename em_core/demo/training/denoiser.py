"""Joint training of the UNet and the text encoder: noise prediction with an attention teacher."""

from dataclasses import dataclass
from pathlib import Path
from time import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from jaxtyping import Float, Int
from numpy.random import Generator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from em_core.demo import vocabulary
from em_core.demo.captions import Caption, Look, random_caption
from em_core.demo.training.data import MOST_OBJECTS, SceneTable, open_table
from em_core.demo.training.export import export_model
from em_core.demo.training.parallel import agree, average_gradients, share_parameters
from em_core.demo.training.schedule import AveragedWeights, Log, cosine_rate
from em_core.demo.training.teacher import TaughtColumns, attention_loss, teach

LENGTH = 77
ROWS = MOST_OBJECTS + 1


@dataclass(frozen=True)
class DenoiserSettings:
    """How UNet and text encoder are trained; `batch` is per process, `early` is in minutes."""

    minutes: float = 50.0
    batch: int = 16
    rate: float = 1.2e-3
    snr_limit: float = 5.0
    teacher_weight: float = 0.1
    ground_weight: float = 0.3
    average: float = 0.999
    seed: int = 0
    compile: bool = True
    first_export: float = 8.0
    export_every: float = 10.0


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


def compact_ids(table: dict[str, int]) -> dict[str, int]:
    """Rows of the words in a token table that holds only them, in the order of their true ids."""
    ordered = sorted(vocabulary.WORDS, key=lambda word: table[word + "</w>"])
    return {word: row for row, word in enumerate(ordered)}


def noise_schedule() -> Float[Tensor, "1000"]:
    """alpha_bar of the scaled-linear schedule of Stable Diffusion (0.00085 to 0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@dataclass(frozen=True)
class Batch:
    """Latents, token rows, prompt columns to watch, their true maps and weights."""

    z: Float[Tensor, "b 4 16 16"]
    tokens: Int[Tensor, "b 77"]
    select: Float[Tensor, "b k 77"]
    target: Float[Tensor, "b k 16 16"]
    weight: Float[Tensor, "b k"]


class Batches:
    """Random batches of latents with fresh captions."""

    def __init__(
        self, table: SceneTable, latents: Path, rows: dict[str, int], ground_weight: float
    ) -> None:
        self.table = table
        self.latents = np.load(latents, mmap_mode="r")
        self.rows = rows
        self.ground_weight = ground_weight

    def draw(self, index: Int[np.ndarray, "b"], rng: Generator, empty: float = 0.1) -> Batch:
        """The scenes at `index`, each with a random caption."""
        captions = [
            random_caption(self.looks(i), self.background(i), rng, empty) for i in index
        ]
        return self.of(index, captions)

    def of(self, index: Int[np.ndarray, "b"], captions: list[Caption]) -> Batch:
        """The scenes at `index` with the given captions."""
        z = torch.from_numpy(self.latents[index].copy()).float()
        labels = torch.from_numpy(self.table.labels[index])
        seen = F.one_hot(labels.long(), ROWS).permute(0, 3, 1, 2).float()
        seen = F.avg_pool2d(seen, 4)
        select = torch.zeros(len(index), ROWS, LENGTH)
        target = torch.zeros(len(index), ROWS, 16, 16)
        weight = torch.zeros(len(index), ROWS)
        for b, caption in enumerate(captions):
            for row, (at, which) in enumerate(zip(caption.nouns, caption.meant, strict=True)):
                select[b, row, at + 1], weight[b, row] = 1.0, 1.0
                target[b, row] = seen[b, which + 1]
            if caption.ground is not None:
                select[b, -1, caption.ground + 1], weight[b, -1] = 1.0, self.ground_weight
                target[b, -1] = seen[b, 0]
        return Batch(z, self.tokens(captions), select, target, weight)

    def tokens(self, captions: list[Caption]) -> Int[Tensor, "b 77"]:
        """Token rows: start, the words, then end up to the full length."""
        start, end = len(self.rows), len(self.rows) + 1
        rows = torch.full((len(captions), LENGTH), end)
        rows[:, 0] = start
        for b, caption in enumerate(captions):
            words = [self.rows[word] for word in caption.words]
            rows[b, 1 : 1 + len(words)] = torch.tensor(words, dtype=torch.long)
        return rows

    def looks(self, index: int) -> list[Look]:
        """Shape, colour and pattern of a scene's objects, from left to right."""
        return [
            (vocabulary.SHAPES[s], vocabulary.COLOURS[c], vocabulary.PATTERNS[p])
            for s, c, p in self.table.looks[index]
            if s >= 0
        ]

    def background(self, index: int) -> str:
        """Word of a scene's background."""
        return vocabulary.BACKGROUNDS[int(self.table.backgrounds[index])]


def stratified_steps(count: int, rng: torch.Generator) -> Int[Tensor, "b"]:
    """One timestep from each of `count` equal parts of 0 to 999, shuffled."""
    parts = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return (parts * 1000).long().clamp_max(999)[torch.randperm(count, generator=rng)]


class Objective:
    """The training loss of a batch; its UNet part is compiled when asked."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel, s: DenoiserSettings) -> None:
        self.unet, self.text, self.settings = unet, text, s
        self.alpha_bar = noise_schedule()
        self.taught = teach(unet)
        self.run = torch.compile(self._unet_losses) if s.compile else self._unet_losses

    def __call__(
        self, batch: Batch, eps: Tensor, t: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, ""]]:
        """Squared error of the noise per sample (unweighted), and the attention loss."""
        a = self.alpha_bar[t][:, None, None, None]
        z_t = a.sqrt() * batch.z + (1 - a).sqrt() * eps
        with torch.autocast("cpu", torch.bfloat16):
            y = self.text(batch.tokens).last_hidden_state
        weight = batch.weight * self.alpha_bar[t].sqrt()[:, None]
        return self.run(z_t, t, y, eps, batch.select, batch.target, weight)

    def _unet_losses(
        self, z_t: Tensor, t: Tensor, y: Tensor, eps: Tensor, select: Tensor, target: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        columns = TaughtColumns(select)
        for processor in self.taught:
            processor.columns = columns
        with torch.autocast("cpu", torch.bfloat16):
            out = self.unet(z_t, t, y, return_dict=False)[0]
        error = (out.float() - eps).square().mean(dim=(1, 2, 3))
        return error, attention_loss(columns.maps, target, weight)

    def snr_weight(self, t: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
        """min(SNR, limit) / SNR: Min-SNR weights for noise prediction (Hang 2023, Eq. 7)."""
        snr = self.alpha_bar[t] / (1 - self.alpha_bar[t])
        return snr.clamp_max(self.settings.snr_limit) / snr


def train_denoiser(
    rank: int, work: Path, tokenizer: Path, out: Path, early: Path | None, log_path: Path,
    settings: DenoiserSettings,
) -> None:
    """One process of the training; process 0 writes whole model folders to `early` and `out`."""
    torch.manual_seed(settings.seed + 1000 * rank)
    noise = torch.Generator().manual_seed(settings.seed + 1000 * rank + 7)
    rng = np.random.default_rng([settings.seed, 77, rank])
    table, log = open_table(work / "data"), Log(log_path)
    ids = vocabulary.read_ids(tokenizer)
    batches = Batches(table, work / "latents.npy", compact_ids(ids), settings.ground_weight)
    model = nn.ModuleDict(
        {"unet": new_unet(), "text": new_text_encoder(len(vocabulary.WORDS) + 2)}
    ).train()
    share_parameters(model.parameters())
    average = AveragedWeights(model, settings.average)
    objective = Objective(model["unet"], model["text"], settings)  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, (0.9, 0.99), weight_decay=0.01)
    count, step, progress, start = len(batches.latents), 0, 0.0, time()
    sums = np.zeros(3)
    next_export = settings.first_export
    while progress < 1:
        batch = batches.draw(rng.integers(0, count, settings.batch), rng)
        t = stratified_steps(settings.batch, noise)
        eps = torch.randn(batch.z.shape, generator=noise)
        error, taught = objective(batch, eps, t)
        weighted = (objective.snr_weight(t) * error).mean()
        loss = weighted + settings.teacher_weight * taught
        optimiser.zero_grad()
        loss.backward()
        average_gradients(model.parameters())
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(size):
            raise FloatingPointError(f"The gradient is not finite at step {step}.")
        optimiser.param_groups[0]["lr"] = settings.rate * cosine_rate(progress, step, 200)
        optimiser.step()
        average.update(model)
        step += 1
        start = time() if step == 3 else start
        progress = agree((time() - start) / 60 / settings.minutes) if step > 3 else 0.0
        sums += [float(weighted.detach()), float(error.detach().mean()), float(taught.detach())]
        if step % 100 == 0:
            if rank == 0:
                w, e, a = (round(float(value) / 100, 5) for value in sums)
                log.write(part="denoiser", step=step, samples=step * 2 * settings.batch, loss=w,
                          noise_error=e, attention_error=a, progress=round(progress, 4))
            sums[:] = 0
        if rank == 0 and early is not None and progress * settings.minutes >= next_export:
            export_model(average.module, ids, work / "vae", tokenizer, early)
            next_export += settings.export_every
    if rank == 0:
        export_model(average.module, ids, work / "vae", tokenizer, out)
