"""What the commands share: loading models, reading pictures, showing progress."""

import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..demo import model_path
from ..errors import UserError
from ..examples import Example, NamedMasks
from ..files import write_text
from ..hosts.diffusers import DiffusersHost
from ..hosts.loading import AUTO, DTYPES, torch_device
from ..hosts.planned import PlannedModel
from ..method.loop import StepEvent
from ..method.state import RunState
from ..model.plans import AUTO as PLAN
from ..model.plans import CHOICES
from ..pictures import read_mask, read_picture
from ..prompts import ConceptPrompt
from ..show.words import say_missing


def positive(text: str) -> int:
    """Parse a whole number greater than 0; an argparse type."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise ArgumentTypeError(f"expected a whole number greater than 0, got {text!r}")
    return value


def add_source(parser: ArgumentParser) -> None:
    """Add `--model` and `--device`."""
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, a diffusers pipeline folder, a .safetensors checkpoint, or a name on the model hub "
        "(default: %(default)s)",
    )
    add_device(parser)


def add_model(parser: ArgumentParser) -> None:
    """Add `--model`, `--device` and `--dtype`."""
    add_source(parser)
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default=AUTO,
        help="number type of the model: auto is bfloat16 on a card that computes in it, else float32 "
        "(default: %(default)s)",
    )


def add_device(parser: ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument(
        "--device", default="cpu", help="torch device, such as cpu or cuda (default: %(default)s)"
    )


def plan_of(text: str) -> str:
    """Parse the name of a memory plan, written without the comma and the space; an argparse type."""
    return text.replace("-", ", ")


def add_plan(parser: ArgumentParser) -> None:
    """Add `--plan`."""
    names = [name.replace(", ", "-") for name in CHOICES]
    parser.add_argument(
        "--plan",
        type=plan_of,
        choices=CHOICES,
        metavar=f"{{{','.join(names)}}}",
        default=PLAN,
        help="how to spend the device's memory: automatic goes by what is free and by what the run needs. half: "
        "half precision (bfloat16 where the card has it), for tokens and LoRA. recomputing: slower, computes "
        "activations twice. fp8: the UNet's weights rest in 8 bits. float32: full precision, which "
        "cross_attention and full need, and which a CPU takes. When memory runs out, the next smaller plan goes "
        "on from the last step (default: %(default)s)",
    )


def add_any_weights(parser: ArgumentParser) -> None:
    """Add `--any-weights`."""
    parser.add_argument(
        "--any-weights",
        action="store_true",
        help="also accept a fine-tune of the model that the concepts were learned on",
    )


def add_guidance(parser: ArgumentParser) -> None:
    """Add `--guidance`."""
    parser.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        help="scale of classifier-free guidance (default: %(default)s)",
    )


def load_host(model: str, device: str = "cpu", dtype: str = "float32") -> DiffusersHost:
    """Load the model that `--model` names.

    Raises:
        UserError: there is no such model or device.
    """
    quiet_libraries()
    place = torch_device(device)
    source = model_path() if model == "demo" else model
    return DiffusersHost.load(source, place, dtype)


def write_line(text: str) -> None:
    """Write a line for people, apart from what a command gives."""
    sys.stderr.write(text + "\n")


def load_planned(model: str, device: str, plan: str) -> PlannedModel:
    """Read the model that `--model` names, to learn on it as `--plan` says.

    Raises:
        UserError: there is no such model or device.
    """
    quiet_libraries()
    source = model_path() if model == "demo" else model
    return PlannedModel(source, device, plan, say=write_line)


def require_folder(out: Path) -> None:
    """Fail before the work starts, not after it, if the folder cannot be written to.

    Raises:
        UserError: the folder cannot be created, or nothing can be written to it.
    """
    probe = out / ".writable"
    write_text(probe, "")
    probe.unlink()


def quiet_libraries() -> None:
    """Silence loading bars and notes on optional packages; the commands show their own progress."""
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
    except ImportError:
        return  # loading the model reports what is missing


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
            raise UserError(
                f"Bad number of {what}. Expected {len(images)} (one per picture), got {len(items)}."
            )
    examples = []
    for index, (image, text) in enumerate(zip(images, prompts, strict=True)):
        prompt = ConceptPrompt.parse(text).require_concepts()
        given = read_masks(masks[index], prompt.names, all_needed=True) if masks else {}
        truth = read_masks(truths[index], prompt.names, all_needed=False) if truths else {}
        examples.append(Example(read_picture(image), prompt, given, truth))
    return examples


def load_tqdm() -> Any:
    """Return the class of progress bars.

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
    """A progress bar that shows the loss and, if the true masks are known, the mean IoU."""

    def __init__(self, quiet: bool = False) -> None:
        """
        Raises:
            UserError: a bar is wanted but tqdm is not installed.
        """
        self.new_bar = None if quiet else load_tqdm()
        self.bar, self.phase = None, ""
        self.shown: dict[str, str] = {}
        self.said = ""

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Update the bar for an event, and say once which concepts were not found."""
        missing = say_missing(event.missing, len(state.pictures))
        if event.masks and missing != self.said:
            self.said = missing
            self.write(missing or "All concepts are found now.")
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
        """Start the bar for a phase."""
        self.close()
        self.phase = event.phase
        titles = {
            "em": "learning tokens and masks",
            "joint": "learning tokens and weights",
            "visual": "learning to look at pictures",
        }
        if self.new_bar is not None:
            self.bar = self.new_bar(total=event.steps, desc=titles[event.phase], unit="step")

    def write(self, line: str) -> None:
        """Write a line above the bar, also where no bar is wanted."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")

    def close(self) -> None:
        """Close the bar, if one is open."""
        if self.bar is not None:
            self.bar.close()
