"""`python -m em_core masks`: find words or learned concepts in a picture."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..hosts.diffusers import DiffusersHost
from ..masks.resizing import resize
from ..masks.settings import MaskSettings
from ..masks.thresholds import Threshold
from ..pictures import read_picture, save_image, save_mask, to_image
from ..presets import em_settings
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet
from ..runs.finding import find_masks
from ..show.drawing import overlay
from ..show.words import say_missing
from .common import add_any_weights, add_model, load_host, positive, require_folder

EXAMPLE = """examples:
  python -m em_core masks --image photo.png --prompt "a photo of <a:star> and <b:heart> on grass" --out output/masks
  python -m em_core masks --image photo.png --prompt "a photo of <rex> on sand" \\
      --concepts output/learned/concepts.safetensors --out output/masks"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `masks` command."""
    parser = subparsers.add_parser(
        "masks",
        help="find masks of words or learned concepts in a picture",
        description="Find masks of words (<name:words>) or of learned concepts (<name>) from the model's "
        "attention.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture to search")
    parser.add_argument(
        "--prompt",
        required=True,
        help="description of the picture that marks what to find as <name:words> or <name>",
    )
    parser.add_argument("--concepts", type=Path, help="a concepts.safetensors file")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for mask_<name>.png, heat_<name>.png and overlay.png",
    )
    parser.add_argument(
        "--passes",
        type=positive,
        default=50,
        help="number of noise samples to average (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        help="a number between 0 and 1, which the normalised attention map must exceed, or otsu (default: "
        "what suits the model)",
    )
    parser.add_argument(
        "--no-crf", action="store_true", help="do not refine the masks with the DenseCRF"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise (default: %(default)s)"
    )
    add_any_weights(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write masks, heat maps and an overlay."""
    picture, prompt = read_picture(args.image), ConceptPrompt.parse(args.prompt).require_concepts()
    host = load_host(args.model, args.device, args.dtype)
    concepts = learned_concepts(args, host)
    require_folder(args.out)
    settings = mask_settings(args, em_settings(host.identity().family).masks)
    found = find_masks(host, picture, prompt, concepts, settings, args.seed)
    glows = resize(found.maps, (picture.shape[-2], picture.shape[-1]), "map")
    for name, glow, mask in zip(found.names, glows, found.masks, strict=True):
        save_mask(args.out / f"mask_{name}.png", mask)
        save_image(args.out / f"heat_{name}.png", to_image(glow[None]))
    save_image(args.out / "overlay.png", overlay(picture, found.masks))
    if found.missing:
        sys.stderr.write(say_missing(dict.fromkeys(found.missing, (1,)), 1) + "\n")
    return 0


def mask_settings(args: argparse.Namespace, settings: MaskSettings) -> MaskSettings:
    """Return the family's settings with the given options applied."""
    settings = replace(settings, init_timesteps=args.passes)
    if args.no_crf:
        settings = replace(settings, crf=None)
    if args.threshold is None:
        return settings
    return replace(settings, threshold=read_threshold(args.threshold))


def learned_concepts(args: argparse.Namespace, host: DiffusersHost) -> ConceptSet | None:
    """Load the concepts of `--concepts`; None without that option.

    Raises:
        UserError: the file is not a concept file, or its concepts do not fit the model.
    """
    if args.concepts is None:
        return None
    concepts = ConceptSet.load(args.concepts)
    concepts.require_fit(host.identity(), any_weights=args.any_weights)
    return concepts


def read_threshold(text: str) -> Threshold:
    """Parse a number between 0 and 1, or "otsu".

    Raises:
        UserError: it is neither.
    """
    if text == "otsu":
        return "otsu"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"Bad threshold {text!r}. Expected a number between 0 and 1, or otsu.")
    return value
