"""Jobs from a file of them, or from a folder of pictures with their prompts beside them."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Notice, UserError
from .job import FIELDS, SHORT, Job, read_job

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
PROMPT, MASKS, TRUTH = ".txt", ".masks", ".truth"
MOST_SAID = 10


def read_jobs(source: Path, defaults: Mapping[str, Any]) -> list[Job]:
    """Return the jobs of a file with one JSON object a line, or of a folder of pictures.

    In a folder, each picture is a job under its own name, and each folder of pictures in it is one job
    of all of them. A picture's prompt is in the text file of its name; its masks, if there are any, are in
    the folder of its name with `.masks`, and true ones in that with `.truth`.

    Args:
        source: the file or folder.
        defaults: fields of jobs that do not have them.

    Raises:
        UserError: the file cannot be read, a line of it is no job, or two different jobs have one name; the
            message tells every line that is wrong.
    """
    if source.is_dir():
        given = list(enumerate(folder_jobs(source), start=1))
        where, base = "job", Path()
    else:
        given, where, base = lines_of(source), "line", source.parent
    jobs: list[Job] = []
    wrong: list[str] = []
    first: dict[str, tuple[int, Job]] = {}
    for number, values in given:
        try:
            if isinstance(values, UserError):
                raise values
            job = read_job(with_defaults(values, defaults), base)
            known = first.setdefault(job.name.casefold(), (number, job))
            if known[1] != job:
                raise UserError(
                    f"The name {job.name!r} is also that of another job, in {where} {known[0]}. Give each its own."
                )
            jobs.append(job)
        except UserError as error:
            name = (
                f" ({values['name']})" if isinstance(values, Mapping) and "name" in values else ""
            )
            wrong.append(f"{where} {number}{name}: {error}")
    if wrong:
        more = [f"and {len(wrong) - MOST_SAID} more"] if len(wrong) > MOST_SAID else []
        lines = "\n  ".join([*wrong[:MOST_SAID], *more])
        raise UserError(f"{source} cannot be used, and nothing was started:\n  {lines}")
    if not jobs:
        raise UserError(
            f"No job in {source}. Expected a file with one JSON object a line, or a folder of pictures with "
            "their prompts beside them (rex.png and rex.txt)."
        )
    return jobs


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job's fields with defaults for those it lacks and its kind has.

    A default prompt is that of each picture.
    """
    kind = values.get("kind", defaults.get("kind", "learn"))
    others = {name for of in FIELDS.values() for name in of} - set(FIELDS.get(str(kind), ()))
    defaults = {name: value for name, value in defaults.items() if name not in others}
    if not isinstance(values.get("pictures"), list):
        return {**defaults, **values}
    own = {name: value for name, value in defaults.items() if name in SHORT}
    pictures = [{**own, **p} if isinstance(p, Mapping) else p for p in values["pictures"]]
    rest = {name: value for name, value in defaults.items() if name not in SHORT}
    return {**rest, **values, "pictures": pictures}


def lines_of(file: Path) -> list[tuple[int, Any]]:
    """Return the number of each line and its object, or the error that is to be said of it.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Could not read {file} ({error}). Expected a text file in UTF-8 with one JSON object a line, or a "
            "folder of pictures."
        ) from error
    return [(n, object_of(line)) for n, line in enumerate(lines, start=1) if line.strip()]


def object_of(line: str) -> Mapping[str, Any] | UserError:
    """Return a line's JSON object, or the error that it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"not JSON ({error}): {line[:60]!r}")
    if not isinstance(found, dict):
        return UserError(f"expected a JSON object, got {line[:60]!r}")
    return found


def folder_jobs(folder: Path) -> Iterator[dict[str, Any]]:
    """Return the jobs of a folder, as they would stand in a file."""
    prompts = {file.stem for file in folder.glob(f"*{PROMPT}")}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES:
            prompts.discard(path.stem)
            yield {"name": path.stem, "pictures": [picture_in(path)]}
        elif path.is_dir() and path.suffix not in (MASKS, TRUTH):
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
            if images:
                yield {"name": path.name, "pictures": [picture_in(image) for image in images]}
    say_left_over(folder, sorted(prompts))


def picture_in(image: Path) -> dict[str, str]:
    """Return a picture with what lies beside it; without a prompt there, the job has none and is refused."""
    found = {"image": str(image.absolute())}
    prompt = image.with_suffix(PROMPT)
    if prompt.is_file():
        try:
            found["prompt"] = prompt.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Could not read {prompt} ({error}).") from error
    for what, suffix in (("masks", MASKS), ("truth", TRUTH)):
        if image.with_suffix(suffix).is_dir():
            found[what] = str(image.with_suffix(suffix).absolute())
    return found


def say_left_over(folder: Path, prompts: Sequence[str]) -> None:
    """Say which text files belong to no picture."""
    if prompts:
        warnings.warn(
            f"No picture of {', '.join(name + PROMPT for name in prompts[:MOST_SAID])} in {folder}, so nothing "
            "is made of it.",
            Notice,
            stacklevel=3,
        )
