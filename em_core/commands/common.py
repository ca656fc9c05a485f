"""What the commands share: models, pictures, progress."""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..demo import model_path
from ..errors import UserError
from ..examples import Example, NamedMasks
from ..files import write_text
from ..hosts.diffusers import DiffusersHost
from ..method.loop import StepEvent
from ..method.state import RunState
from ..pictures import read_mask, read_picture
from ..prompts import ConceptPrompt


def positive(text: str) -> int:
    """A whole number over 0: what argparse calls a type."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ArgumentTypeError(f"expected a whole number over 0, got {text!r}")
    return value


def add_model(parser: ArgumentParser) -> None:
    """`--model` and `--device`."""
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, a diffusers pipeline folder, or a .safetensors checkpoint (%(default)s)",
    )
    add_device(parser)


def add_device(parser: ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument(
        "--device", default="cpu", help="torch device, such as cpu or cuda (%(default)s)"
    )


def load_host(model: str, device: str = "cpu") -> DiffusersHost:
    """The model that `--model` names.

    Raises:
        UserError: no such model or device.
    """
    quiet_libraries()
    place = torch_device(device)
    return DiffusersHost.load(model_path() if model == "demo" else Path(model), place)


def torch_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        UserError: there is none.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"No device {name!r} here. Expected cpu, or cuda on a machine with one."
        ) from error


def require_folder(out: Path) -> None:
    """Fail before the work, not after it, where the folder cannot be written.

    Raises:
        UserError: it cannot be made, or nothing can be written to it.
    """
    probe = out / ".writable"
    write_text(probe, "")
    probe.unlink()


def quiet_libraries() -> None:
    """No loading bars and no notes on optional packages: the commands show their own progress."""
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
    except ImportError:
        return  # loading the model says what is missing


def read_masks(folder: Path, names: Sequence[str], *, all_needed: bool) -> NamedMasks:
    """`mask_<concept>.png` of the named concepts in a folder.

    Raises:
        UserError: no such folder, or a mask that is needed is missing.
    """
    if not folder.is_dir():
        raise UserError(f"No folder {folder}. Expected one with mask_<concept>.png files.")
    files = {name: folder / f"mask_{name}.png" for name in names}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing and (all_needed or len(missing) == len(files)):
        raise UserError(f"No {', '.join(missing)} in {folder}. Masks are named mask_<concept>.png.")
    return {name: read_mask(file) for name, file in files.items() if file.is_file()}


def read_examples(
    images: Sequence[Path],
    prompts: Sequence[str],
    masks: Sequence[Path] = (),
    truths: Sequence[Path] = (),
) -> list[Example]:
    """Examples from files; one prompt may serve all pictures, mask folders come one per picture.

    Raises:
        UserError: counts that do not match, or any file that cannot be used.
    """
    prompts = list(prompts) * len(images) if len(prompts) == 1 else list(prompts)
    for what, items in (("prompts", prompts), ("mask folders", masks), ("truth folders", truths)):
        if items and len(items) != len(images):
            raise UserError(
                f"Bad number of {what}. Expected {len(images)}, one per picture, got {len(items)}."
            )
    examples = []
    for i, (image, text) in enumerate(zip(images, prompts, strict=True)):
        prompt = ConceptPrompt.parse(text).require_concepts()
        given = read_masks(masks[i], prompt.names, all_needed=True) if masks else {}
        truth = read_masks(truths[i], prompt.names, all_needed=False) if truths else {}
        examples.append(Example(read_picture(image), prompt, given, truth))
    return examples


def load_tqdm() -> Any:
    """The class of progress bars.

    Raises:
        UserError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError(
            "The progress bar needs tqdm. Install it (pip install tqdm), or add --quiet."
        ) from error
    return tqdm


class Progress:
    """A progress bar that shows the losses and, where it is known, the mean IoU."""

    def __init__(self, quiet: bool = False) -> None:
        """
        Raises:
            UserError: a bar is wanted and tqdm is not installed.
        """
        self.new_bar = None if quiet else load_tqdm()
        self.bar, self.phase = None, ""
        self.shown: dict[str, str] = {}

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Listen to an event."""
        if event.phase != self.phase and event.phase != "start":
            self.open(event)
        if event.losses:
            self.shown["loss"] = f"{event.losses['total']:.4f}"
        if event.iou:
            self.shown["IoU"] = f"{sum(event.iou.values()) / len(event.iou):.3f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(event.step - self.bar.n)

    def open(self, event: StepEvent) -> None:
        """Start the bar of a phase."""
        self.close()
        self.phase = event.phase
        titles = {"em": "learning tokens and masks", "joint": "learning tokens and weights"}
        if self.new_bar is not None:
            self.bar = self.new_bar(total=event.steps, desc=titles[event.phase], unit="step")

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
