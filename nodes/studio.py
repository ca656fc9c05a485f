"""Draws and keeps the pictures that Evaluate Concepts measures, and writes its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths
import torch
from PIL import Image

from ..em_core.evaluate.album import PICTURES, name_of
from ..em_core.evaluate.evaluation import Evaluation, Masks, quantised
from ..em_core.evaluate.finding import find_concepts
from ..em_core.evaluate.task import Task
from ..em_core.evaluate.writing import write_report
from ..em_core.pictures import Picture, save_image, to_image
from ..em_core.presets import em_settings
from .host.comfy_host import ComfyHost

REPORTS = "evaluations"
PREVIEW = 320


class Studio:
    """Draws pictures, finds concepts in them, keeps the pictures, and shows progress on the node."""

    def __init__(self, host: ComfyHost, task: Task, steps: int, cfg: float, passes: int) -> None:
        self.host, self.task, self.steps, self.cfg = host, task, steps, cfg
        family = em_settings(host.models.family)
        self.masks = replace(family.masks, init_timesteps=passes)
        self.drawn: dict[tuple[int, int], Image.Image] = {}
        self.bar = comfy.utils.ProgressBar(len(task.prompts) * len(task.seeds))
        with (
            torch.no_grad()
        ):  # a word that the model does not know is said before anything is drawn
            host.encode_prompts(task.prompts, task.concepts.vectors)

    def draw(self, number: int, seed: int) -> Picture:
        concepts, host = self.task.concepts, self.host
        prompt = self.task.prompts[number]
        with host.applied(concepts.weights, concepts.lora_scale):
            found = host.draw(prompt, concepts.vectors, [seed], self.steps, self.cfg)
        picture = quantised(found[0])
        self.drawn[number, seed] = to_image(picture)
        return picture

    def find(self, number: int, seed: int, picture: Picture) -> Masks:
        prompt = self.task.prompts[number]
        return find_concepts(self.host, picture, prompt, self.task.concepts, self.masks)

    def watch(self, done: int, total: int) -> None:
        """Advance the bar with the latest picture, and stop if the user asked for it."""
        latest = next(reversed(self.drawn.values()))
        self.bar.update_absolute(done, total, ("JPEG", latest, PREVIEW))
        mm.throw_exception_if_processing_interrupted()

    def image(self, number: int, seed: int) -> Image.Image:
        return self.drawn[number, seed].copy()


def save(name: str, evaluation: Evaluation, studio: Studio, facts: dict[str, str]) -> Path:
    """Write the report and the pictures to a new folder; return the page."""
    base = Path(folder_paths.get_output_directory()) / REPORTS
    folder = first_free(base, name)
    for scores in evaluation.pictures:
        file = f"{name_of(scores.prompt, scores.seed)}.png"
        save_image(folder / PICTURES / file, studio.image(scores.prompt, scores.seed))
    title = f"Evaluation of {', '.join(evaluation.concepts)}"
    write_report(folder, title, evaluation, studio.image, facts | seeds_of(evaluation.seeds))
    return folder / "report.html"


def seeds_of(seeds: Sequence[int]) -> dict[str, str]:
    return {"pictures per prompt": f"{len(seeds)}, seeds from {seeds[0]}"}


def first_free(base: Path, name: str) -> Path:
    """Return the folder of this name with the first number that is not taken."""
    number = 1
    while (base / f"{name}_{number:05d}").exists():
        number += 1
    return base / f"{name}_{number:05d}"
