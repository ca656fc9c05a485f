"""A job's key: a hash of all that acts on its results, from the content of its files."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from ..masks.settings import MaskSettings
from ..model.plans import WHOLE
from ..presets import em_settings, joint_settings
from ..prompts import ConceptPrompt
from ..runs.digest import Digest
from ..runs.key import pack_digest, prompt_parts
from ..settings import EMSettings, JointSettings, from_json, to_json
from .job import Job, Model, PictureFiles
from .models import Facts

BLOCK = 2**20


@dataclass(frozen=True)
class Task:
    """A job with its key, as it is sent to whoever does it.

    Attributes:
        job: the job.
        key: its key; "" where it has none, since something of it cannot be read.
        out: the batch's folder.
        pack: digest of the version of this package that asks.
        error: why it has no key, "" if it has one.
        model: digest of the model that it is to be done with.
        family: the model's family.
    """

    job: Job
    key: str
    out: Path
    pack: str = ""
    error: str = ""
    model: str = ""
    family: str = ""


def task_of(job: Job, facts: Facts, out: Path) -> Task:
    """Return a job with its key, or with the reason why it can have none."""
    error = facts.error
    if not error:
        try:
            key = job_key(job, facts)
            return Task(job, key, out, pack_digest(), model=facts.digest, family=facts.family)
        except UserError as bad:
            error = str(bad)
    return Task(job, "", out, error=error)


def job_key(job: Job, facts: Facts) -> str:
    """Return a hex digest of all that acts on a job's results.

    These are the model's weights, the content of every file, prompts but for their white space, settings
    with the family's defaults, the version of this package, and the number of threads. Neither the job's
    name acts, unless exports are named so, nor where its files are.

    Raises:
        UserError: a file is missing, or a prompt or a setting is wrong.
    """
    acting = [
        "job",
        job.kind,
        pack_digest(),
        facts.digest,
        job.model.device_type,
        job.threads,
        [picture_parts(picture, job) for picture in job.pictures],
        settings_parts(job, facts.family),
        file_digest(job.concepts) if job.concepts else "",
        [prompt_parts(ConceptPrompt.parse(prompt)) for prompt in job.prompts],
        [job.seed, job.count, job.steps, float(job.guidance), job.passes],
        [encoder_digest(name) for name in (job.clip, job.dino, job.lpips)],
        [job.name, job.triggers] if job.export else [],
    ]
    return Digest().add(acting).hexdigest()


def picture_parts(picture: PictureFiles, job: Job) -> list[Any]:
    """Return the content of a picture's files, and its prompt."""
    prompted = job.kind in ("learn", "masks")
    prompt = ConceptPrompt.parse(picture.prompt)
    prompt = prompt.require_concepts() if prompted else prompt
    folders = {"masks": picture.masks, "truth": picture.truth}
    found = {
        what: {name: file_digest(file) for name, file in mask_files(folder, prompt).items()}
        for what, folder in folders.items()
        if folder is not None
    }
    return [file_digest(picture.image), prompt_parts(prompt), found]


def mask_files(folder: Path, prompt: ConceptPrompt) -> dict[str, Path]:
    """Return the masks of a prompt's concepts that are in a folder; reading says which are missing."""
    files = {name: folder / f"mask_{name}.png" for name in prompt.names}
    return {name: file for name, file in files.items() if file.is_file()}


def settings_parts(job: Job, family: str) -> list[Any]:
    """Return the settings that act on a job, with the family's defaults.

    Raises:
        UserError: one is unknown or wrong.
    """
    if job.kind == "learn":
        return [to_json(settings) for settings in learning_settings(job, family)]
    return [to_json(mask_settings(job, family))]


def learning_settings(job: Job, family: str) -> tuple[EMSettings, JointSettings]:
    """Return the settings of both phases; a job whose pictures have masks learns under them.

    Raises:
        UserError: a setting is unknown or wrong, or there are masks that nothing would come of.
    """
    given = any(picture.masks for picture in job.pictures)
    mode = {"mode": "given"} if given else {}
    em = changed(em_settings(family), {**mode, **job.settings})
    if given and em.mode != "given":
        raise UserError(
            f'Mode {em.mode} does not use masks. Leave "mode" or "masks" out; true masks, to compare with, are '
            '"truth".'
        )
    joint = joint_settings(family, job.joint.get("kind", "none"))
    return em, changed(joint, job.joint)


def mask_settings(job: Job, family: str) -> MaskSettings:
    """Return the settings with which masks are found.

    Raises:
        UserError: a setting is unknown or wrong.
    """
    if job.kind == "masks":
        return changed(em_settings(family).masks, job.settings)
    return replace(em_settings(family).masks, init_timesteps=job.passes)


def changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """Return settings with changes, which name their fields and those of the settings inside them.

    Raises:
        UserError: there is no such setting, or it cannot be so.
    """
    known = to_json(settings)
    try:
        return from_json(type(settings), merged(known, changes, ""))
    except (TypeError, AttributeError) as error:
        raise UserError(f"Bad settings {dict(changes)!r}: {error}.") from error


def merged(known: Mapping[str, Any], changes: Mapping[str, Any], inside: str) -> dict[str, Any]:
    """Return JSON values with changes; an object is changed part by part.

    Raises:
        UserError: there is no such value.
    """
    strange = [inside + name for name in changes if name not in known]
    if strange:
        meant = "".join(did_you_mean(name, [inside + n for n in known]) for name in strange)
        raise UserError(
            f"No setting {', '.join(strange)}.{meant} Expected some of {', '.join(inside + n for n in known)}."
        )
    found = dict(known)
    for name, value in changes.items():
        part = known[name]
        if isinstance(part, Mapping) and isinstance(value, Mapping):
            value = merged(part, value, f"{inside}{name}.")
        found[name] = value
    return found


def loading(job: Job) -> Model:
    """Return how a job's model is loaded: whole weights are learned in float32.

    Raises:
        UserError: another number type is asked for.
    """
    if job.joint.get("kind") not in WHOLE:
        return job.model
    if job.model.dtype not in ("auto", "float32"):
        raise UserError(
            f"Joint kind {job.joint['kind']} learns whole weights, in float32; got dtype {job.model.dtype}. Leave "
            "dtype out, or learn a lora."
        )
    return replace(job.model, dtype="float32")


def encoder_digest(name: str) -> str:
    """Return a hash of an encoder's files; of one on the model hub, its name."""
    if not name or not Path(name).exists():
        return name
    status = [
        (file, file.stat().st_mtime_ns, file.stat().st_size)
        for file in sorted(Path(name).rglob("*"))
        if file.is_file()
    ]
    return digest_of_files(tuple(status))


@functools.lru_cache(maxsize=64)
def digest_of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    return Digest().add([[file.name, file_digest(file)] for file, _, _ in files]).hexdigest()


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise UserError(f"Could not read {file}: {error.strerror or error}.") from error
    return digest.hexdigest()
