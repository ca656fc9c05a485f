"""`python -m em_core discover`: find the things in a picture without a word about them."""

import argparse
import sys
from pathlib import Path

from ..files import write_text
from ..pictures import read_picture, save_image, save_mask
from ..runs.finding import discover
from ..show.drawing import overlay
from .common import add_model, load_host, positive, require_folder

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
        type=positive,
        default=8,
        help="how many things to find at most (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise (default: %(default)s)"
    )
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write the prompt, the masks and an overlay."""
    picture = read_picture(args.image)
    host = load_host(args.model, args.device, args.dtype)
    require_folder(args.out)
    prompt, found = discover(host, picture, seed=args.seed, most=args.most)
    write_text(args.out / "prompt.txt", f"{prompt}\n")
    for name, mask in zip(found.names, found.masks, strict=True):
        save_mask(args.out / f"mask_{name}.png", mask)
    save_image(args.out / "overlay.png", overlay(picture, found.masks))
    sys.stdout.write(f"{len(found.names)} found, from left to right: {', '.join(found.names)}\n")
    return 0
