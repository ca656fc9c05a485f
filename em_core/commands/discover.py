"""`python -m em_core discover`: find the things in a picture without a word about them."""

import argparse
from pathlib import Path

from ..files import write_text
from ..jobs.outputs import mask_file
from ..method.discover import nameless
from ..pictures import read_picture, save_image, save_mask
from ..runs.finding import MOST, discover
from ..show.drawing import overlay
from ..show.words import say_masks
from . import options
from .common import add_model, load_host, require_folder
from .writing import add_output_options, require_new, say, written

PROMPT, OVERLAY = "prompt.txt", "overlay.png"
EXAMPLE = """example:
  python -m em_core discover --image photo.png --out output/found
  python -m em_core learn --image photo.png --prompt "$(cat output/found/prompt.txt)" --out output/learned"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `discover` command."""
    parser = subparsers.add_parser(
        "discover",
        help="find the things in a picture without saying what they are",
        description="Find how many things a picture shows, a mask for each, and the prompt to learn them "
        "with. They are named concept1, concept2, ... from left to right.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture to search")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for prompt.txt, mask_<name>.png and overlay.png",
    )
    parser.add_argument(
        "--most",
        type=options.positive,
        default=MOST,
        help="how many things to find at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=options.seed, default=0, help="seed of the noise (default: %(default)s)"
    )
    add_output_options(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write the prompt, the masks and an overlay."""
    picture = read_picture(args.image)
    possible = [PROMPT, OVERLAY, *map(mask_file, nameless(args.most).names)]
    require_new([args.out / name for name in possible], args.overwrite)
    host = load_host(args.model, args.device, args.dtype)
    require_folder(args.out)
    prompt, found = discover(host, picture, seed=args.seed, most=args.most)
    write_text(args.out / PROMPT, f"{prompt}\n")
    masks = dict(zip(found.names, found.masks, strict=True))
    for name, mask in masks.items():
        save_mask(args.out / mask_file(name), mask)
    save_image(args.out / OVERLAY, overlay(picture, found.masks))
    say(
        args,
        f"{len(masks)} found, from left to right: {say_masks([masks])}.",
        written(args.out, [PROMPT, OVERLAY, *map(mask_file, masks)]),
    )
    return 0
