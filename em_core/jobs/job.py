"""A job: what is to be done, as a value that is read from JSON and sent to whoever does it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from ..exchange.saving import require_name
from ..hosts.loading import AUTO, DTYPES
from .inputs import CONCEPTS, in_folder

KINDS = ("learn", "masks", "draw", "evaluate")
SHORT = ("image", "prompt", "masks", "truth")
"""Fields of a picture, which a job with one picture may have itself."""


@dataclass(frozen=True)
class Model:
    """A model, and how it is loaded: `--model`, `--device` and `--dtype` of the other commands."""

    source: str = "demo"
    device: str = "cpu"
    dtype: str = AUTO

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class PictureFiles:
    """A picture by its files.

    Attributes:
        image: the picture.
        prompt: its prompt, which marks concepts; "" where a job has no use for one.
        masks: folder of `mask_<concept>.png` for mode "given"; None if there are none.
        truth: folder of true masks; None if there are none.
    """

    image: Path
    prompt: str = ""
    masks: Path | None = None
    truth: Path | None = None


@dataclass(frozen=True)
class Job:
    """One job. All but its name acts on its results, and so on its key.

    Attributes:
        name: what people call it; its exports are named so too.
        kind: "learn" concepts, find "masks", "draw" or "evaluate" learned concepts.
        model: the model.
        threads: how many threads it computes with on a CPU, where sums depend on their number.
        pictures: what is learned from, searched, or compared with.
        settings: what differs from the settings of the model's family: of the EM loop to learn, of the
            masks to find masks.
        joint: the same of the joint phase; its `kind` chooses what is learned.
        seed: seed of everything random; when learning, `settings` has it.
        concepts: a file of learned concepts.
        prompts: what is drawn.
        count, steps, guidance: pictures per prompt, sampling steps, scale of classifier-free guidance.
        passes: noise samples to find a concept in a drawn picture with.
        clip, dino, lpips: encoders that measure, see `python -m em_core evaluate --help`.
        export: whether the concepts are also written as files for other programs.
        triggers: trigger words of the exports, as in `rex: sks`.
    """

    name: str
    kind: str = "learn"
    model: Model = Model()
    threads: int = 1
    pictures: tuple[PictureFiles, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    joint: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    concepts: Path | None = None
    prompts: tuple[str, ...] = ()
    count: int = 4
    steps: int = 30
    guidance: float = 5.0
    passes: int = 20
    clip: str = ""
    dino: str = ""
    lpips: str = ""
    export: bool = False
    triggers: str = ""


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def is_count(value: object) -> bool:
    return type(value) is int and value > 0


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_pictures(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


Check = tuple[Callable[[Any], bool], str]
TEXT: Check = (is_text, "a text")
COUNT: Check = (is_count, "a whole number greater than 0")
OBJECT: Check = (lambda value: isinstance(value, Mapping), "an object of settings by name")
EVERY: dict[str, Check] = {
    "name": TEXT,
    "kind": (lambda value: value in KINDS, " or ".join(KINDS)),
    "model": TEXT,
    "device": TEXT,
    "dtype": (lambda value: value in DTYPES, " or ".join(DTYPES)),
    "threads": COUNT,
}
PICTURES: dict[str, Check] = {
    "pictures": (is_pictures, "a list of objects with image, prompt, masks and truth"),
    **dict.fromkeys(SHORT, TEXT),
}
SEED: dict[str, Check] = {
    "seed": (lambda value: type(value) is int and value >= 0, "a whole number")
}
DRAWN: dict[str, Check] = {
    "concepts": TEXT,
    "prompts": (is_texts, "a list of texts"),
    "count": COUNT,
    "steps": COUNT,
    "guidance": (is_number, "a number"),
    **SEED,
}
FIELDS: dict[str, dict[str, Check]] = {
    "learn": {
        **EVERY,
        **PICTURES,
        "settings": OBJECT,
        "joint": OBJECT,
        "export": (lambda value: isinstance(value, bool), "true or false"),
        "triggers": TEXT,
    },
    "masks": {**EVERY, **PICTURES, "settings": OBJECT, "concepts": TEXT, **SEED},
    "draw": {**EVERY, **DRAWN},
    "evaluate": {
        **EVERY,
        **PICTURES,
        **DRAWN,
        "passes": COUNT,
        **dict.fromkeys(("clip", "dino", "lpips"), TEXT),
    },
}
PICTURE_FIELDS: dict[str, Check] = dict.fromkeys(SHORT, TEXT)


def read_job(values: Mapping[str, Any], folder: Path) -> Job:
    """Return the job that a JSON object describes; docs/many_jobs.md lists its fields.

    Args:
        values: the object.
        folder: what relative paths are relative to.

    Raises:
        UserError: a field is unknown, missing, or of the wrong type.
    """
    kind = values.get("kind", "learn")
    require_fields("job", {"kind": kind}, EVERY)
    require_fields(f"{kind} job", values, FIELDS[kind])
    if "name" not in values:
        raise UserError('No name. Expected one for each job, as in "name": "rex".')
    given = {name: value for name, value in values.items() if name in PLAIN}
    model = {name: values[name] for name in ("device", "dtype") if name in values}
    job = Job(
        **given,
        model=Model(**model, **({"source": values["model"]} if "model" in values else {})),
        name=require_name(values["name"]),
        pictures=pictures_of(values, folder, prompted=kind in ("learn", "masks")),
        prompts=tuple(values.get("prompts", ())),
        concepts=in_folder(folder / values["concepts"], CONCEPTS) if "concepts" in values else None,
    )
    require_whole(job)
    return job


PLAIN = {f.name for f in fields(Job)} - {"name", "model", "pictures", "prompts", "concepts"}


def require_fields(what: str, values: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    """Refuse fields that are unknown or of the wrong type.

    Raises:
        UserError: there is one.
    """
    for name, value in values.items():
        if name not in known:
            raise UserError(
                f"Unknown field {name!r} of a {what}.{did_you_mean(name, known)} Expected some of "
                f"{', '.join(known)}."
            )
        fine, expected = known[name]
        if not fine(value):
            raise UserError(f"Bad {name}. Expected {expected}, got {value!r}.")


def pictures_of(
    values: Mapping[str, Any], folder: Path, *, prompted: bool
) -> tuple[PictureFiles, ...]:
    """Return the pictures of a job, which are in its list or, if it has one alone, in its own fields."""
    one = {name: values[name] for name in SHORT if name in values}
    if one and "pictures" in values:
        raise UserError(
            f"A job has both pictures and {', '.join(one)}. Expected the list of pictures, or one picture's "
            "own fields."
        )
    found = []
    for picture in values.get("pictures", [one] if one else []):
        require_fields("picture", picture, PICTURE_FIELDS)
        missing = [n for n in ("image", "prompt")[: 1 + prompted] if n not in picture]
        if missing:
            raise UserError(
                f"A picture has no {' and no '.join(missing)}. Expected both in the job, or in a folder of "
                "pictures a text file of the same name beside each."
            )
        paths = {n: folder / picture[n] for n in ("image", "masks", "truth") if n in picture}
        found.append(PictureFiles(**paths, prompt=picture.get("prompt", "")))
    return tuple(found)


def require_whole(job: Job) -> None:
    """Refuse a job without what its kind needs.

    Raises:
        UserError: something is missing, or there is more of it than the kind takes.
    """
    if job.kind in ("learn", "masks") and not job.pictures:
        raise UserError(f"No picture. A {job.kind} job needs image and prompt, or a list pictures.")
    if job.kind == "masks" and len(job.pictures) > 1:
        raise UserError(
            f"A masks job takes one picture, got {len(job.pictures)}. Make one job of each."
        )
    if job.kind in ("draw", "evaluate") and (job.concepts is None or not job.prompts):
        raise UserError(
            f"A {job.kind} job needs concepts, a file of learned concepts, and prompts."
        )
    if job.kind == "evaluate" and not (job.clip or job.dino or job.lpips):
        raise UserError("An evaluate job needs something to measure with: clip, dino or lpips.")
    if job.triggers and not job.export:
        raise UserError('"triggers" are of the exports. Add "export": true, or leave them out.')
