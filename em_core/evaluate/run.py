"""An evaluation into a folder with diffusers: draw, find, measure, report; it can be stopped and goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..examples import Example
from ..hosts.diffusers import DiffusersHost
from ..masks.settings import MaskSettings
from ..pictures import Picture, open_image
from ..presets import em_settings
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet
from ..runs.digest import Digest
from ..runs.key import model_digest, pack_digest
from ..settings import to_json
from .album import PICTURES, Album, name_of
from .encoders import Instruments
from .evaluation import Evaluation, Masks, evaluate
from .finding import find_concepts
from .references import reference_crops
from .summary import Row
from .task import Task
from .writing import write_report


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn and searched.

    Attributes:
        seeds: seeds of each prompt's pictures.
        steps: sampling steps.
        guidance: scale of classifier-free guidance.
        passes: noise samples with which a concept's mask is found.
        facts: what the report says of it besides.
        bar: class of a progress bar, such as tqdm; None shows none.
    """

    seeds: tuple[int, ...] = tuple(range(8))
    steps: int = 30
    guidance: float = 5.0
    passes: int = 20
    facts: Mapping[str, str] = field(default_factory=dict)
    bar: Any = None

    @property
    def told(self) -> dict[str, str]:
        """What the report says of the drawing."""
        seeds = (
            f"{self.seeds[0]} to {self.seeds[-1]}" if len(self.seeds) > 1 else str(self.seeds[0])
        )
        return {
            **self.facts,
            "pictures per prompt": f"{len(self.seeds)}, seeds {seeds}",
            "sampling": f"{self.steps} steps, guidance {self.guidance:g}",
            "masks": f"{self.passes} noise samples",
        }


def evaluate_into(
    folder: Path,
    host: DiffusersHost,
    concepts: ConceptSet,
    prompts: Sequence[ConceptPrompt],
    examples: Sequence[Example],
    instruments: Instruments,
    drawing: Drawing,
) -> tuple[Evaluation, tuple[Row, ...]]:
    """Evaluate concepts, with pictures, masks and reports in a folder; return the scores and the table.

    Pictures and masks that are in the folder already are neither drawn nor searched for again.

    Args:
        folder: where everything goes.
        host: the model.
        concepts: the learned concepts.
        prompts: what to draw.
        examples: the pictures that the concepts were learned from, to compare with; may be empty.
        instruments: the encoders.
        drawing: how pictures are drawn.

    Raises:
        UserError: prompts, pictures or folder do not go with the concepts, or the model does not know a
            word.
    """
    references = reference_crops(concepts, examples, host)
    task = Task(concepts, tuple(prompts), drawing.seeds, instruments, references)
    with torch.no_grad():  # a word that the model does not know is said before an hour of drawing
        host.encode_prompts(task.prompts, concepts.vectors)
    masks = replace(em_settings(host.identity().family).masks, init_timesteps=drawing.passes)
    album = Album(folder, drawing_key(host, task, masks, drawing))
    draw, find = in_album(album, host, task, masks, drawing)
    total = len(task.prompts) * len(task.seeds)
    bar = (
        drawing.bar(total=total, desc="drawing and measuring", unit="picture")
        if drawing.bar
        else None
    )
    try:
        evaluation = evaluate(task, draw, find, lambda *_: bar.update() if bar else None)
    finally:
        if bar:
            bar.close()
    rows = write_report(
        folder,
        f"Evaluation of {', '.join(concepts.names)}",
        evaluation,
        opener(folder),
        drawing.told,
    )
    return evaluation, rows


def in_album(
    album: Album, host: DiffusersHost, task: Task, masks: MaskSettings, drawing: Drawing
) -> tuple[Callable[[int, int], Picture], Callable[[int, int, Picture], Masks]]:
    """Return functions that draw a picture and find concepts in it, each once."""

    def draw(number: int, seed: int) -> Picture:
        prompt, how = task.prompts[number], (drawing.steps, drawing.guidance)
        # One by one: a picture must not depend on which others are there already.
        return album.picture(
            number, seed, lambda: host.generate(prompt, task.concepts, [seed], *how)[0]
        )

    def find(number: int, seed: int, picture: Picture) -> Masks:
        prompt = task.prompts[number]
        return album.masks(
            number,
            seed,
            prompt.names,
            lambda: find_concepts(host, picture, prompt, task.concepts, masks),
        )

    return draw, find


def drawing_key(host: DiffusersHost, task: Task, masks: MaskSettings, drawing: Drawing) -> str:
    """Return a hash of all that acts on the pictures and masks, but for the seeds, which files name."""
    concepts = task.concepts
    vectors = {name: dict(sorted(of.items())) for name, of in sorted(concepts.vectors.items())}
    acting = [
        pack_digest(),
        model_digest(host),
        str(host.device.type),
        vectors,
        dict(sorted(concepts.weights.items())),
        concepts.lora_scale,
        [str(prompt) for prompt in task.prompts],
        to_json(masks),
        [drawing.steps, drawing.guidance],
    ]
    return Digest().add(acting).hexdigest()


def opener(folder: Path) -> Callable[[int, int], Image.Image]:
    """Return a function that opens a folder's pictures."""
    return lambda prompt, seed: open_image(folder / PICTURES / f"{name_of(prompt, seed)}.png")
