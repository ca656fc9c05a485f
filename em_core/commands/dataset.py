"""`python -m em_core dataset`: pictures, masks and captions in the layout of another trainer."""

import argparse
from pathlib import Path

from ..exchange.datasets import Choices
from ..exchange.layouts import LAYOUTS, masks_of_run, read_words, save_dataset
from ..prompts import merge_concepts
from ..runs.concept_set import ConceptSet
from . import options
from .common import read_examples, require_folder
from .writing import add_quiet, require_new, say

EXAMPLE = """example:
  python -m em_core dataset --image photo.png --prompt "a photo of <rex:dog> on grass" --masks output/masks \\
      --words "rex: sks" --layout OneTrainer --out output/rex_dataset"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `dataset` command."""
    parser = subparsers.add_parser(
        "dataset",
        help="write pictures, masks and captions as other trainers read them",
        description="Write a data set with masks for another trainer. Captions are the prompts with a trigger in "
        "each concept's place, without the words it started from, so that the trigger has to carry its looks.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="one or more pictures")
    parser.add_argument(
        "--prompt", nargs="+", required=True, help="one prompt for all pictures, or one for each"
    )
    parser.add_argument(
        "--masks",
        type=Path,
        nargs="+",
        default=[],
        help="a folder of mask_<concept>.png for each picture",
    )
    parser.add_argument(
        "--concepts",
        type=options.concepts,
        help="a concepts.safetensors file, or its folder, for the masks of its run",
    )
    parser.add_argument("--layout", choices=list(LAYOUTS), required=True, help="whose layout")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the folder if it is there; otherwise that is an error",
    )
    parser.add_argument(
        "--words", default="", help="triggers for the captions, as in 'rex: sks, doll: ohwx doll'"
    )
    parser.add_argument("--apart", action="store_true", help="pictures of each concept by itself")
    parser.add_argument(
        "--crop", action="store_true", help="with --apart: cut to the concept and a margin"
    )
    parser.add_argument(
        "--paint-out", action="store_true", help="with --apart: paint over the other concepts"
    )
    add_quiet(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write the folder and say on stdout what is in it."""
    require_new([args.out], args.overwrite)
    require_folder(args.out.absolute().parent)
    examples = read_examples(args.image, args.prompt, args.masks)
    masks = [example.masks for example in examples]
    if args.concepts is not None and not args.masks:
        masks = masks_of_run(ConceptSet.load(args.concepts), examples)
    names = [concept.name for concept in merge_concepts(e.prompt for e in examples)]
    choices = Choices(read_words(args.words, names), args.apart, args.crop, args.paint_out)
    say(args, save_dataset(examples, masks, choices, args.layout, args.out))
    return 0
