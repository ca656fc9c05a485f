"""Train the demo model from a seed: `python -m em_core.demo.train --out DIR --tokenizer CLIP`.

Needs the extra `diffusers` and about five hours on two CPU cores. `--tokenizer` is a folder
with CLIP's whole vocab.json and merges.txt. The rounds are those that the shipped weights
went through; `--start` runs only the last of them, from a model folder, and `--share` shortens
all of them for a trial. A training that was interrupted goes on when it is run again.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from . import vocabulary
from .training.autoencoder import AutoencoderSettings, train_autoencoder
from .training.checkpoint import Checkpoint
from .training.data import open_table, render_table
from .training.denoiser import DenoiserSettings, train_denoiser
from .training.export import encode_table
from .training.loop import Round
from .training.measure import report
from .training.parallel import launch
from .training.sheet import write_sheet


def _denoiser_round(steps: int, rate: float, seed: int, end: float = 1.0) -> Round:
    return Round(steps, rate, batch=16, end=end, weight_decay=0.01, average=0.999, seed=seed)


AUTOENCODER_ROUNDS = (
    (Round(steps=1342, rate=1.5e-3, batch=8), AutoencoderSettings()),
    (Round(steps=1739, rate=1.2e-3, batch=4, seed=1), AutoencoderSettings()),
    (
        Round(steps=2000, rate=1.2e-3, batch=4, seed=5),
        AutoencoderSettings(squared=True, recoloured=0.1),
    ),
)
# A denoiser's round, the weight limit of noisy steps, and the weights of mean and coarse errors.
DENOISER_ROUNDS = (
    (_denoiser_round(4680, 1.2e-3, seed=0, end=0.474), DenoiserSettings(5.0, 1.0, 0.0, 0.0)),
    (_denoiser_round(2440, 1.0e-3, seed=1, end=0.42), DenoiserSettings(5.0, 15.0, 0.0, 0.0)),
    (_denoiser_round(2640, 9e-4, seed=2), DenoiserSettings()),
    (_denoiser_round(2700, 7e-4, seed=3), DenoiserSettings()),
    (_denoiser_round(3500, 1e-3, seed=10), DenoiserSettings()),
    (_denoiser_round(3400, 1e-3, seed=11), DenoiserSettings()),
)


# Rounds in the world of many objects, omissions and any order; the last one has no teacher.
WORLD_ROUNDS = (
    (_denoiser_round(3000, 5e-4, seed=20), DenoiserSettings()),
    (_denoiser_round(700, 4e-4, seed=22), DenoiserSettings()),
    (_denoiser_round(200, 2e-4, seed=21), DenoiserSettings(teacher_weight=0.0)),
)


def main() -> None:
    """Render, train the autoencoder, encode, train the denoiser, measure, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--tokenizer", type=Path, required=True, help="whole CLIP tokenizer")
    parser.add_argument("--start", type=Path, help="model folder to go on from: last rounds only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps of all rounds")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    Training(**vars(arguments)).run()


@dataclass(frozen=True)
class Training:
    """Training of a model folder `out/model`, with a log, a sample sheet and figures beside it.

    What `out` holds is kept, so a training that was interrupted goes on when it is run again.
    """

    out: Path
    tokenizer: Path
    start: Path | None
    seed: int
    scenes: int
    share: float
    processes: int

    def run(self) -> None:
        """All rounds, or with a start only those of the world as it is now."""
        out = self.out
        vocabulary.write_tokenizer(self.tokenizer, out / "tokenizer")
        if not (out / "data").exists():
            render_table(out / "data.part", self.scenes, self.seed, self.processes)
            (out / "data.part").rename(out / "data")
        if self.start is None:
            self._train_autoencoder()
        elif not (out / "vae").exists():
            shutil.copytree(self.start / "vae", out / "vae")
        if not (out / "latents.npy").exists():
            self._encode()
        shutil.copytree(self._train_denoiser(), out / "model", dirs_exist_ok=True)
        write_sheet(out / "model", out / "samples.png", self.seed)
        figures = json.dumps(report(out / "model"), indent=2)
        vocabulary.write_text(out / "figures.json", figures + "\n")

    def _train_autoencoder(self) -> None:
        out = self.out
        places = (out / "data", out / "vae", out / "log.jsonl")
        for index, (round_, settings) in enumerate(AUTOENCODER_ROUNDS):
            checkpoint = Checkpoint(out / "checkpoints" / f"autoencoder_{index}.pt")
            self._launch(train_autoencoder, *places, self._cut(round_), settings, checkpoint)

    def _train_denoiser(self) -> Path:
        """The model folder that the last round has written."""
        out, model = self.out, self.start
        rounds = WORLD_ROUNDS if model else (*DENOISER_ROUNDS, *WORLD_ROUNDS)
        for index, (round_, settings) in enumerate(rounds):
            start, model = model, out / f"model_{index}"
            checkpoint = Checkpoint(out / "checkpoints" / f"denoiser_{index}.pt")
            places = (out, out / "tokenizer", start, model, out / "log.jsonl")
            self._launch(train_denoiser, *places, self._cut(round_), settings, checkpoint)
        return out / f"model_{len(rounds) - 1}"

    def _launch(self, work: Callable[..., None], *arguments: object) -> None:
        launch(work, self.processes, self.out / "join", *arguments)

    def _cut(self, round_: Round) -> Round:
        steps = max(1, int(round_.steps * self.share))
        return replace(round_, steps=steps, seed=round_.seed + 100 * self.seed)

    def _encode(self) -> None:
        """Write scaled latents of the scenes; a new autoencoder gets its scale."""
        out = self.out
        self._launch(_encode_share, self.processes, out)
        parts = [np.load(out / f"latents_{rank}.npy") for rank in range(self.processes)]
        z = np.concatenate(parts).astype(np.float32)
        vae = AutoencoderKL.from_pretrained(out / "vae")
        if self.start is None:
            vae.register_to_config(scaling_factor=round(1 / float(z.std()), 5))
            vae.save_pretrained(out / "vae")
        np.save(out / "latents.npy", (z * vae.config.scaling_factor).astype(np.float16))


def _encode_share(rank: int, processes: int, out: Path) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae").float().eval()
    z = encode_table(rank, processes, open_table(out / "data"), vae)
    np.save(out / f"latents_{rank}.npy", z.half().numpy())


if __name__ == "__main__":
    main()
