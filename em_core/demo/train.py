"""Train the demo model from a seed: `python -m em_core.demo.train --out DIR --seed 0`."""

import argparse
import dataclasses
from pathlib import Path

from em_core.demo.training.autoencoder import AutoencoderSettings, train_autoencoder
from em_core.demo.training.data import render_table
from em_core.demo.training.parallel import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--autoencoder-minutes", type=float, default=10)
    parser.add_argument("--skip", default="")
    arguments = parser.parse_args()
    out = arguments.out
    if "data" not in arguments.skip:
        render_table(out / "data", arguments.scenes, arguments.seed)
    settings = AutoencoderSettings(minutes=arguments.autoencoder_minutes, seed=arguments.seed)
    launch(train_autoencoder, 2, out / "join", out / "data", out / "vae", out / "log.jsonl", settings)


if __name__ == "__main__":
    main()
