"""`python -m em_core masks`: find words or learned concepts in a picture."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from ..jobs.outputs import mask_file
from ..masks.resizing import resize
from ..masks.settings import MaskSettings
from ..masks.thresholds import Threshold
from ..pictures import read_picture, save_image, save_mask, to_image
from ..presets import em_settings
from ..prompts import ConceptPrompt, not_learned, require_use
from ..runs.concept_set import ConceptSet
from ..runs.finding import find_masks
from ..show.drawing import overlay
from ..show.words import say_found, say_masks
from . import options
from .common import add_any_weights, add_model, load_host, require_folder
from .writing import add_output_options, require_new, say, written

OVERLAY = "overlay.png"
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
    parser.add_argument(
        "--concepts", type=options.concepts, help="a concepts.safetensors file, or its folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for mask_<name>.png, heat_<name>.png and overlay.png",
    )
    parser.add_argument(
        "--passes",
        type=options.positive,
        default=50,
        help="number of noise samples to average (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        help="a number between 0 and 1, which the normalised attention map must exceed, or otsu (default: "
        "what suits the model)",
    )
    parser.add_argument(
        "--no-crf", action="store_true", help="do not refine the masks with the DenseCRF"
    )
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="seed of the noise (default: %(default)s)"
    )
    add_output_options(parser)
    add_any_weights(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write masks, heat maps and an overlay."""
    picture = read_picture(args.image)
    concepts = ConceptSet.load(args.concepts) if args.concepts else None
    prompt = prompt_of(args.prompt, concepts)
    files = [OVERLAY, *map(mask_file, prompt.names), *map(heat_file, prompt.names)]
    require_new([args.out / file for file in files], args.overwrite)
    host = load_host(args.model, args.device, args.dtype)
    if concepts is not None:
        concepts.require_fit(host.identity(), any_weights=args.any_weights)
    require_folder(args.out)
    settings = mask_settings(args, em_settings(host.identity().family).masks)
    found = find_masks(host, picture, prompt, concepts, settings, args.seed)
    glows = resize(found.maps, (picture.shape[-2], picture.shape[-1]), "map")
    masks = dict(zip(found.names, found.masks, strict=True))
    for (name, mask), glow in zip(masks.items(), glows, strict=True):
        save_mask(args.out / mask_file(name), mask)
        save_image(args.out / heat_file(name), to_image(glow[None]))
    save_image(args.out / OVERLAY, overlay(picture, found.masks))
    say(args, f"Masks: {say_masks([masks])}.", written(args.out, files))
    said = say_found(found)
    if said:
        sys.stderr.write(said + "\n")
    return 0


def heat_file(name: str) -> str:
    return f"heat_{name}.png"


def prompt_of(text: str, concepts: ConceptSet | None) -> ConceptPrompt:
    """Read the prompt.

    Raises:
        UserError: it is malformed or marks nothing, or something without words that was not learned.
    """
    known = concepts.names if concepts else ()
    prompt = ConceptPrompt.parse(text).require_concepts(known)
    if concepts is None:
        return prompt
    require_use([prompt], known)
    for concept in prompt.concepts:
        if not concept.words and concept.name not in known:
            raise not_learned(concept.name, known)
    return prompt


def mask_settings(args: argparse.Namespace, settings: MaskSettings) -> MaskSettings:
    """Return the family's settings with the given options applied."""
    settings = replace(settings, init_timesteps=args.passes)
    if args.no_crf:
        settings = replace(settings, crf=None)
    if args.threshold is None:
        return settings
    return replace(settings, threshold=args.threshold)


def threshold(text: str) -> Threshold:
    """Parse a number between 0 and 1, or "otsu"; an argparse type."""
    if text == "otsu":
        return "otsu"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(
            f"expected a number between 0 and 1, or otsu, got {text!r}"
        )
    return value
