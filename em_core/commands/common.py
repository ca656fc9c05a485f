"""What the commands share: loading models, reading pictures, showing progress."""

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_text
from ..hosts.loading import AUTO, DTYPES
from ..hosts.planned import PlannedModel
from ..jobs.inputs import read_examples, read_masks
from ..jobs.models import load_host, quiet_libraries, source_of
from ..method.loop import StepEvent
from ..method.state import RunState
from ..model.plans import AUTO as PLAN
from ..model.plans import CHOICES
from ..show.words import say_missing
from . import options

__all__ = [
    "load_host",
    "quiet_libraries",
    "read_examples",
    "read_masks",
]  # as all commands have them


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
        type=options.not_negative,
        default=5.0,
        help="scale of classifier-free guidance (default: %(default)s)",
    )


def write_line(text: str) -> None:
    """Write a line for people, apart from what a command gives."""
    sys.stderr.write(text + "\n")


def load_planned(model: str, device: str, plan: str, quiet: bool = False) -> PlannedModel:
    """Read the model that `--model` names, to learn on it as `--plan` says; unless it is to be quiet, it
    says which plan it chooses.

    Raises:
        UserError: there is no such model or device.
    """
    quiet_libraries()
    say = (lambda text: None) if quiet else write_line
    return PlannedModel(source_of(model), device, plan, say=say)


def require_folder(out: Path) -> None:
    """Fail before the work starts, not after it, if the folder cannot be written to.

    Raises:
        UserError: the folder cannot be created, or nothing can be written to it.
    """
    probe = out / ".writable"
    write_text(probe, "")
    probe.unlink()


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
        missing = say_missing(event.missing, len(state.pictures), event.doubtful)
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
