"""What the commands share: models, pictures, progress."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from ..concepts import ConceptPrompt
from ..demo import model_path
from ..diffusers_host import DiffusersHost
from ..em import StepEvent
from ..errors import UserError
from ..examples import Example, NamedMasks
from ..pictures import read_mask, read_picture
from ..state import RunState


def add_model(parser: ArgumentParser) -> None:
    """`--model` and `--device`."""
    parser.add_argument(
        "--model",
        default="demo",
        help="demo, a diffusers pipeline folder, or a .safetensors checkpoint",
    )
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")


def load_host(model: str, device: str = "cpu") -> DiffusersHost:
    """The model that `--model` names."""
    quiet_libraries()
    return DiffusersHost.load(model_path() if model == "demo" else Path(model), device)


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


class Progress:
    """A progress bar that shows the losses and, where it is known, the mean IoU."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.bar, self.phase = quiet, None, ""
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
        from tqdm import tqdm

        self.close()
        self.phase = event.phase
        titles = {"em": "learning tokens and masks", "joint": "learning tokens and weights"}
        self.bar = tqdm(
            total=event.steps, desc=titles[event.phase], disable=self.quiet, unit="step"
        )

    def close(self) -> None:
        """End the bar."""
        if self.bar is not None:
            self.bar.close()
