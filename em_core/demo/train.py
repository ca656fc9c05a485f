"""Train the demo model from a seed: `python -m em_core.demo.train --out DIR --tokenizer CLIP`.

Needs the extra `diffusers` and about four hours on two CPU cores. `--tokenizer` is a folder
with CLIP's whole vocab.json and merges.txt. The rounds are those that the shipped weights
went through; `--share` shortens all of them for a trial.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from . import vocabulary
from .training.autoencoder import AutoencoderSettings, train_autoencoder
from .training.data import open_table, render_table
from .training.denoiser import DenoiserSettings, train_denoiser
from .training.export import encode_table
from .training.loop import Round
from .training.measure import report
from .training.parallel import launch
from .training.sheet import write_sheet

PROCESSES = 2
SCENES = 60_000


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


def main() -> None:
    """Render, train the autoencoder, encode, train the denoiser, measure, draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--tokenizer", type=Path, required=True, help="whole CLIP tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="share of scenes and steps")
    arguments = parser.parse_args()
    train(arguments.out, arguments.tokenizer, arguments.seed, arguments.share)


def train(out: Path, full_tokenizer: Path, seed: int = 0, share: float = 1.0) -> None:
    """Train a model folder `out/model`, with a log, a sample sheet and figures beside it."""
    vocabulary.write_tokenizer(full_tokenizer, out / "tokenizer")
    render_table(out / "data", int(SCENES * share), seed, PROCESSES)
    for round_, kind in AUTOENCODER_ROUNDS:
        launch(
            train_autoencoder,
            PROCESSES,
            out / "join",
            out / "data",
            out / "vae",
            out / "log.jsonl",
            _cut(round_, seed, share),
            kind,
        )
    _encode(out)
    start = None
    for round_, settings in DENOISER_ROUNDS:
        places = (out, out / "tokenizer", start, out / "model", out / "log.jsonl")
        launch(
            train_denoiser, PROCESSES, out / "join", *places, _cut(round_, seed, share), settings
        )
        start = out / "model"
    write_sheet(out / "model", out / "samples.png", seed)
    figures = json.dumps(report(out / "model"), indent=2)
    vocabulary.write_text(out / "figures.json", figures + "\n")


def _cut(round_: Round, seed: int, share: float) -> Round:
    return replace(round_, steps=max(1, int(round_.steps * share)), seed=round_.seed + 100 * seed)


def _encode(out: Path) -> None:
    """Write scaled latents of the scenes, and the scale into the autoencoder."""
    launch(_encode_share, PROCESSES, out / "join", out)
    parts = [np.load(out / f"latents_{rank}.npy") for rank in range(PROCESSES)]
    z = np.concatenate(parts).astype(np.float32)
    scale = round(1 / float(z.std()), 5)
    np.save(out / "latents.npy", (z * scale).astype(np.float16))
    vae = AutoencoderKL.from_pretrained(out / "vae")
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(out / "vae")


def _encode_share(rank: int, out: Path) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    z = encode_table(rank, PROCESSES, open_table(out / "data"), vae)
    np.save(out / f"latents_{rank}.npy", z.half().numpy())


if __name__ == "__main__":
    main()
