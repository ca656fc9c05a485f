"""Examples, masks and concepts from files."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..examples import Example, NamedMasks
from ..pictures import read_mask, read_picture
from ..prompts import ConceptPrompt

CONCEPTS, CONDITION = "concepts.safetensors", "condition.safetensors"


def in_folder(path: Path, name: str) -> Path:
    """Return the file of this name in a folder, as learning leaves it there, or the path itself if it is none.

    Raises:
        UserError: it is a folder without that file.
    """
    if not path.is_dir():
        return path
    if not (path / name).is_file():
        raise UserError(f"No {name} in the folder {path}. Expected the file itself, or its folder.")
    return path / name


def read_masks(folder: Path, names: Sequence[str], *, all_needed: bool) -> NamedMasks:
    """Read `mask_<concept>.png` of the named concepts from a folder.

    Raises:
        UserError: there is no such folder, it has none of the masks, or one that is needed is missing.
    """
    if not folder.is_dir():
        raise UserError(f"No folder {folder}. Expected a folder with mask_<concept>.png files.")
    files = {name: folder / f"mask_{name}.png" for name in names}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing and (all_needed or len(missing) == len(files)):
        raise UserError(
            f"No {', '.join(missing)} in {folder}. Expected masks named mask_<concept>.png."
        )
    return {name: read_mask(file) for name, file in files.items() if file.is_file()}


def read_examples(
    images: Sequence[Path],
    prompts: Sequence[str],
    masks: Sequence[Path] = (),
    truths: Sequence[Path] = (),
) -> list[Example]:
    """Read examples from files.

    One prompt may serve all pictures; mask folders are given one per picture.

    Raises:
        UserError: the counts do not match, or a file cannot be used.
    """
    prompts = list(prompts) * len(images) if len(prompts) == 1 else list(prompts)
    for what, items in (("prompts", prompts), ("mask folders", masks), ("truth folders", truths)):
        if items and len(items) != len(images):
            quotes = " Put each prompt in quotes." if what == "prompts" else ""
            raise UserError(
                f"Bad number of {what}. Expected {len(images)} (one per picture), got {len(items)}.{quotes}"
            )
    return [
        read_example(
            image,
            text,
            masks[index] if masks else None,
            truths[index] if truths else None,
        )
        for index, (image, text) in enumerate(zip(images, prompts, strict=True))
    ]


def read_example(
    image: Path, text: str, masks: Path | None = None, truth: Path | None = None
) -> Example:
    """Read an example from a picture, its prompt, and folders of its masks and true masks.

    Raises:
        UserError: a file cannot be used, or the prompt marks no concept.
    """
    prompt = ConceptPrompt.parse(text).require_concepts()
    given = read_masks(masks, prompt.names, all_needed=True) if masks else {}
    known = read_masks(truth, prompt.names, all_needed=False) if truth else {}
    return Example(read_picture(image), prompt, given, known)
