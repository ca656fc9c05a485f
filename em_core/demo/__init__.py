"""The demo world: seeded little scenes and a small diffusion model that draws them."""

import json
from pathlib import Path


def model_path() -> Path:
    """Folder of the demo model: a Stable Diffusion 1.x pipeline folder of tiny size."""
    return Path(__file__).parent / "model"


def known_words() -> tuple[str, ...]:
    """The words that the demo model was trained on, sorted."""
    return tuple(json.loads((model_path() / "words.json").read_text(encoding="utf-8")))
