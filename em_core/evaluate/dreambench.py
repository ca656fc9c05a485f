"""DreamBench, the data set of DreamBooth (Ruiz et al. 2023, arXiv 2208.12242), from the user's folder.

Its layout: a folder per subject with a few pictures, and `prompts_and_classes.txt`, which lists each
subject's class and the prompts for things and for live subjects.
"""

import re
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..examples import Example
from ..prompts import Concept, ConceptPrompt
from .cases import Case, require_data

LIST = "prompts_and_classes.txt"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LIVE = ("cat", "dog")  # the classes that the prompts for live subjects are for
SUBJECT = re.compile(r"^([A-Za-z]\w*),([a-z][a-z ]*)$", re.MULTILINE)
TEMPLATE = re.compile(r"""^\s*(['"])(.*\{0\}.*)\1\.format\(""", re.MULTILINE)
OBJECT_PROMPTS, LIVE_PROMPTS = "Object Prompts", "Live Subject Prompts"


def dreambench_cases(folder: Path) -> list[Case]:
    """Return one case per subject whose folder is there, in the list's order.

    In a prompt the token stands where the data set has an identifier and the class, since it was learned
    from the class's word.

    Raises:
        UserError: the folder is not laid out as DreamBench.
    """
    layout = f"DreamBench's folder, with {LIST} and a folder of pictures per subject"
    text = require_data(folder / LIST, layout).read_text(encoding="utf-8")
    classes, things, live = sections(text, folder / LIST)
    known = [
        (name, kind)
        for name, kind in SUBJECT.findall(classes)
        if name != "subject_name" and (folder / name).is_dir()
    ]
    if not known:
        raise UserError(f"No subject's folder in {folder}. Expected {layout}.")
    return [case_of(folder / name, kind, live if kind in LIVE else things) for name, kind in known]


def sections(text: str, file: Path) -> tuple[str, list[str], list[str]]:
    """Return the part with the classes, the prompts for things and those for live subjects.

    Raises:
        UserError: one of them is missing.
    """
    classes, middle, rest = text.partition(OBJECT_PROMPTS)
    things, end, live = rest.partition(LIVE_PROMPTS)
    found = [[match[2] for match in TEMPLATE.finditer(part)] for part in (things, live)]
    if not (middle and end and all(found)):
        raise UserError(
            f"{file} is not DreamBench's list. Expected the parts '{OBJECT_PROMPTS}' and '{LIVE_PROMPTS}' with "
            "prompts such as 'a {0} {1} in the snow'.format(unique_token, class_token)."
        )
    return classes, found[0], found[1]


def case_of(folder: Path, kind: str, templates: list[str]) -> Case:
    """Return the case of one subject.

    Raises:
        UserError: its folder has no picture.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"No picture in {folder}. Expected {', '.join(PICTURES)} files.")
    concept = Concept(folder.name, kind)
    prompts = tuple(filled(template, concept) for template in templates)
    return Case(folder.name, partial(read, files, f"a photo of {concept}"), prompts)


def filled(template: str, concept: Concept) -> ConceptPrompt:
    """Return a prompt of the data set with the concept in the place of its identifier and class."""
    text = template.replace("{0} {1}", "{0}").replace("{1}", "")
    return ConceptPrompt.parse(text.replace("{0}", f"<{concept.name}>"))


def read(files: list[Path], prompt: str) -> list[Example]:
    return [Example.read(file, prompt) for file in files]
