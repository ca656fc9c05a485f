"""Drawn pictures and found masks in a folder, so that a stopped evaluation goes on where it was."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..files import write_json
from ..pictures import Picture, read_mask, read_picture, save_image, save_mask, to_image
from .evaluation import Masks

KEY = "drawn.json"
PICTURES, MASKS = "pictures", "masks"


def name_of(prompt: int, seed: int) -> str:
    """Return the name of a picture's file, without its ending; prompts are numbered from 1."""
    return f"prompt_{prompt + 1:02d}_seed_{seed}"


class Album:
    """The pictures and masks of one evaluation.

    Attributes:
        folder: where they are, in `pictures/` and `masks/`.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            folder: where the files are or will be.
            key: hash of all that acts on them.

        Raises:
            UserError: the folder holds pictures of another evaluation.
        """
        self.folder = folder
        found = read_key(folder / KEY)
        if found != key and (found is not None or (folder / PICTURES).exists()):
            raise UserError(
                f"{folder} holds pictures that were drawn from other concepts, prompts or settings, or by "
                "another version. Choose another folder with --out, or delete this one."
            )
        write_json(folder / KEY, {"key": key})

    def picture(self, prompt: int, seed: int, draw: Callable[[], Picture]) -> Picture:
        """Return a picture that is there, or else draw and keep it."""
        file = self.folder / PICTURES / f"{name_of(prompt, seed)}.png"
        if not file.is_file():
            save_image(file, to_image(draw()))
        return read_picture(file)

    def masks(
        self, prompt: int, seed: int, names: Sequence[str], find: Callable[[], Masks]
    ) -> Masks:
        """Return the masks of a picture's concepts that are there, or else find and keep them."""
        start = self.folder / MASKS / name_of(prompt, seed)
        files = {name: start.with_name(f"{start.name}_{name}.png") for name in names}
        if not all(file.is_file() for file in files.values()):
            for name, mask in find().items():
                save_mask(files[name], mask)
        return {name: read_mask(file) for name, file in files.items()}


def read_key(file: Path) -> str | None:
    """Return the key in a file; None if there is no such file, "" if it cannot be read."""
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
