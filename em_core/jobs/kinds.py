"""What each kind of job does: read its files, use the core, and write results into a folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from warnings import warn

from ..errors import Notice
from ..evaluate.album import Album
from ..evaluate.encoders import CLIP_IMAGE, DINO, Instruments
from ..evaluate.perceptual import Lpips
from ..evaluate.pretrained import Clip, Dino
from ..evaluate.references import examples_again
from ..evaluate.run import Drawing, evaluate_into
from ..examples import NamedMasks
from ..exchange.saving import save_exports
from ..hosts.diffusers import DiffusersHost
from ..hosts.loading import torch_device
from ..hosts.planned import PlannedModel
from ..masks.guards import Guards
from ..masks.measures import areas, iou
from ..model.jobs import Work as Planned
from ..model.plans import AUTO
from ..pictures import read_picture, save_image, to_image
from ..prompts import ConceptPrompt, require_use
from ..runs.concept_set import ConceptSet
from ..runs.finding import find_masks
from ..runs.key import run_key
from ..runs.learning import learn_concepts
from ..runs.store import RunStore
from ..settings import EMSettings
from ..show.drawing import sheet
from ..show.metrics import curves_of
from ..show.plots import plot_curves
from ..show.words import say_missing
from .inputs import CONCEPTS, read_example
from .job import Job
from .keys import learning_settings, loading, mask_settings
from .models import Facts, host_of, quiet_libraries, source_of
from .outputs import save_masks, save_preview, save_small


@dataclass(frozen=True)
class Work:
    """A job at work.

    Attributes:
        job: the job.
        key: its key.
        facts: of the model.
        kept: a folder that stays until the job is finished, for its state.
        out: the folder for its results.
        check: called now and then; it raises where the job is to stop.
        planned: whether memory has run out with the model that is kept, so that memory plans decide.
    """

    job: Job
    key: str
    facts: Facts
    kept: Path
    out: Path
    check: Callable[[], None]
    planned: bool = False

    @property
    def host(self) -> DiffusersHost:
        """The model that this process keeps."""
        return host_of(loading(self.job))[0]


@dataclass(frozen=True)
class Found:
    """What the index says of a finished job.

    Attributes:
        iou: concept -> the last IoU with true masks, averaged over pictures; empty without them.
        areas: concept -> share of the picture, for each picture.
        missing: concept -> numbers, from 1, of the pictures in which it was not found.
    """

    iou: Mapping[str, float] = field(default_factory=dict)
    areas: Mapping[str, list[float]] = field(default_factory=dict)
    missing: Mapping[str, list[int]] = field(default_factory=dict)


def learn(work: Work) -> Found:
    """Learn concepts; a stopped job goes on from the state that is kept."""
    job = work.job
    examples = [read_example(p.image, p.prompt, p.masks, p.truth) for p in job.pictures]
    em, joint = learning_settings(job, work.facts.family)
    key = run_key(work.facts.digest, examples, em, joint)
    store = RunStore(work.kept / "run")

    def learned_on(host: DiffusersHost, em: EMSettings) -> ConceptSet:
        listeners = [
            lambda event, state: work.check(),
            lambda event, state: note(say_missing({}, len(state.pictures), event.doubtful)),
        ]
        return learn_concepts(host, examples, em, joint, listeners=listeners, store=store, key=key)

    if work.planned:
        concepts = planned_model(job).carry_out(
            Planned(examples, em, joint), lambda fitting: learned_on(fitting.host, fitting.work.em)
        )
    else:
        concepts = learned_on(work.host, em)
    concepts.save(work.out / CONCEPTS)
    shown: NamedMasks = {}
    shares: dict[str, list[float]] = {}
    missing: dict[str, list[int]] = {}
    several = len(examples) > 1
    if em.mode != "none":
        shares, missing = coverage(concepts, em.masks.guards)
        for number, (example, masks) in enumerate(
            zip(examples, concepts.masks, strict=True), start=1
        ):
            size = example.picture.shape[-2:]
            # A file has them in another order than a run, and colours go by it.
            ordered = {name: masks[name] for name in example.prompt.names}
            large = save_masks(work.out, ordered, (size[0], size[1]), number if several else None)
            shown = shown or large
    save_preview(work.out, examples[0].picture, shown)
    plot_curves(concepts.curves, work.out / "curves.png")
    if job.export:
        folder = work.out / "exports"
        save_exports(concepts, job.name, folder, folder, work.host.vocabularies(), job.triggers)
    last = {name: points[-1][1] for name, points in curves_of(concepts.curves, "iou").items()}
    return Found({name: round(value, 4) for name, value in last.items()}, shares, missing)


def planned_model(job: Job) -> PlannedModel:
    """Return a job's model, to be loaded as a memory plan says that fits what is free."""
    plan = "float32" if loading(job).dtype == "float32" else AUTO
    return PlannedModel(source_of(job.model.source), job.model.device, plan)


def coverage(
    concepts: ConceptSet, guards: Guards
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Return each concept's shares of its pictures, and the pictures in which it was not found."""
    shares: dict[str, list[float]] = {}
    missing: dict[str, list[int]] = {}
    for number, masks in enumerate(concepts.masks, start=1):
        for name, mask in sorted(masks.items()):
            share = float(areas(mask))
            shares.setdefault(name, []).append(round(share, 4))
            if not guards.min_area <= share <= guards.max_area:
                missing.setdefault(name, []).append(number)
    return shares, missing


def masks(work: Work) -> Found:
    """Find what a prompt marks in a picture."""
    job, (files,) = work.job, work.job.pictures
    example = read_example(files.image, files.prompt, None, files.truth)
    found = find_masks(
        work.host,
        example.picture,
        example.prompt,
        learned(work) if job.concepts else None,
        mask_settings(job, work.facts.family),
        job.seed,
    )
    named = dict(zip(found.names, found.masks, strict=True))
    size = example.picture.shape[-2:]
    save_masks(work.out, named, (size[0], size[1]))
    save_preview(work.out, example.picture, named)
    known = [name for name in found.names if name in example.truth]
    overlaps = {name: round(float(iou(named[name], example.truth[name])), 4) for name in known}
    shares = {name: [round(float(areas(mask)), 4)] for name, mask in named.items()}
    note(say_missing({}, 1, dict.fromkeys(found.doubtful, (1,))))
    return Found(overlaps, shares, {name: [1] for name in found.missing})


def note(text: str) -> None:
    """Tell something to whoever reads the index, unless there is nothing to tell."""
    if text:
        warn(text, Notice, stacklevel=2)


def learned(work: Work) -> ConceptSet:
    """Return the concepts of a job's file.

    Raises:
        UserError: it is no such file, or of another model.
    """
    concepts = ConceptSet.load(work.job.concepts or "")
    concepts.require_fit(work.host.identity())
    return concepts


def draw(work: Work) -> Found:
    """Draw pictures, one by one; those that are there from before are not drawn again."""
    job, concepts = work.job, learned(work)
    album = Album(work.kept / "drawn", work.key)
    prompts = [ConceptPrompt.parse(text) for text in job.prompts]
    require_use(prompts, concepts.names)
    rows = {}
    for number, (text, prompt) in enumerate(zip(job.prompts, prompts, strict=True)):
        images = []
        for seed in range(job.seed, job.seed + job.count):
            work.check()
            picture = album.picture(number, seed, one_picture(work, prompt, concepts, seed))
            images.append(to_image(picture))
            save_image(work.out / f"prompt_{number + 1}_seed_{seed}.png", images[-1])
        rows[text] = images
    grid = sheet(rows, [f"seed {seed}" for seed in range(job.seed, job.seed + job.count)])
    save_image(work.out / "grid.png", grid)
    save_small(work.out, rows[job.prompts[0]][0])
    return Found()


def one_picture(
    work: Work, prompt: ConceptPrompt, concepts: ConceptSet, seed: int
) -> Callable[[], Any]:
    """Return a function that draws a picture."""
    job = work.job
    return lambda: work.host.generate(prompt, concepts, [seed], job.steps, job.guidance)[0]


def evaluate(work: Work) -> Found:
    """Draw and measure pictures, and write the report; what is drawn already is kept."""
    job, concepts = work.job, learned(work)
    pictures = [read_picture(files.image) for files in job.pictures]
    quiet_libraries()
    device = torch_device(job.model.device)
    clip = Clip.load(job.clip, device) if job.clip else None
    dino = Dino.load(job.dino, device) if job.dino else None
    looks = {name: of for name, of in ((CLIP_IMAGE, clip), (DINO, dino)) if of is not None}
    instruments = Instruments(
        clip, looks, Lpips.load(Path(job.lpips), device) if job.lpips else None
    )
    drawing = Drawing(
        seeds=tuple(range(job.seed, job.seed + job.count)),
        steps=job.steps,
        guidance=job.guidance,
        passes=job.passes,
        facts={"concepts": job.name, "model": job.model.source},
        bar=Checking(work.check),
    )
    folder = work.kept / "evaluation"
    evaluate_into(
        folder,
        work.host,
        concepts,
        [ConceptPrompt.parse(text) for text in job.prompts],
        examples_again(concepts, pictures) if pictures else [],
        instruments,
        drawing,
    )
    shutil.copytree(folder, work.out, dirs_exist_ok=True)
    first = next(iter(sorted((work.out / "pictures").glob("*.png"))))
    save_preview(work.out, read_picture(first), {})
    return Found()


class Checking:
    """Stands in for a progress bar, and looks after each picture whether the job is to stop."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def __call__(self, **_: object) -> "Checking":
        return self

    def update(self) -> None:
        self.check()

    def close(self) -> None:
        pass


DO: Mapping[str, Callable[[Work], Found]] = {
    "learn": learn,
    "masks": masks,
    "draw": draw,
    "evaluate": evaluate,
}
