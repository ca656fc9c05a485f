"""`python -m em_core refine`: sharpen masks with the DenseCRF."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from ..hosts.loading import torch_device
from ..masks.crf import PRESETS, CRFSettings, MaskRefiner, labels
from ..masks.crf.pydensecrf_backend import load
from ..masks.resizing import resize
from ..pictures import read_mask, read_picture, save_mask
from ..show.words import say_masks
from . import options
from .common import add_device, require_folder
from .writing import add_output_options, require_new, say, written

EXAMPLE = """examples:
  python -m em_core refine --image photo.png --mask mask_cat.png mask_dog.png --out output/refined
  python -m em_core refine --image photo.png --mask masks/*.png --out output/refined --working-size 256"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `refine` command."""
    parser = subparsers.add_parser(
        "refine",
        help="sharpen masks along the edges of a picture",
        description=(
            "Refine masks of one picture with a fully connected CRF. A mask is where its file is opaque, or "
            "white if it is opaque throughout; masks of a different size are resized to the picture."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--mask", type=Path, nargs="+", required=True, help="one file per mask")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the refined masks, as PNG files of the same names",
    )
    parser.add_argument(
        "--backend",
        choices=("torch", "pydensecrf"),
        default="torch",
        help="what solves the CRF; pydensecrf must be installed separately (default: %(default)s)",
    )
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="local_colour",
        help="which settings to use: local_colour mends rough masks and leaves good ones alone, cutler and "
        "diffumask are published ones, demo is for the demo model's pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=options.whole(0, 1000),
        help="number of mean-field updates (default: the preset's)",
    )
    parser.add_argument(
        "--working-size",
        type=options.positive,
        help="longer side to shrink the picture to while solving, such as 256 (default: full size)",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="refine each mask on its own; refined masks may then overlap",
    )
    add_output_options(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Refine the masks and write them to --out."""
    settings = settings_of(args)
    if settings.backend == "pydensecrf":
        load()
    targets = output_files(args.mask, args.out)
    require_new(targets, args.overwrite)
    picture = read_picture(args.image).to(torch_device(args.device))
    refiner = MaskRefiner(picture, settings)
    size = (picture.shape[-2], picture.shape[-1])
    masks = torch.cat([resize(read_mask(file)[None].float(), size, "mask") for file in args.mask])
    require_folder(args.out)
    refined = labels(refiner(masks), settings.joint)
    for target, mask in zip(targets, refined.cpu(), strict=True):
        save_mask(target, mask)
    found = {
        target.stem.removeprefix("mask_"): mask
        for target, mask in zip(targets, refined.cpu(), strict=True)
    }
    say(
        args,
        f"Masks: {say_masks([found])}.",
        written(args.out, [target.name for target in targets]),
    )
    return 0


def settings_of(args: argparse.Namespace) -> CRFSettings:
    """Return the preset with the given options applied."""
    settings = replace(
        PRESETS[args.preset],
        backend=args.backend,
        joint=not args.alone,
        working_size=args.working_size,
    )
    return settings if args.iterations is None else replace(settings, iterations=args.iterations)


def output_files(masks: Sequence[Path], folder: Path) -> list[Path]:
    """Return the file that each refined mask is written to: its own name, as PNG.

    Raises:
        UserError: two masks would share a file, or a given mask would be overwritten.
    """
    targets = [folder / f"{mask.stem}.png" for mask in masks]
    double = next((target for target in targets if targets.count(target) > 1), None)
    if double is not None:
        raise UserError(
            f"Two masks would be written to {double}. Expected masks with different names."
        )
    inputs = {mask.resolve() for mask in masks}
    for target in targets:
        if target.resolve() in inputs:
            raise UserError(
                f"{target} would overwrite one of the given masks. Choose another --out folder."
            )
    return targets
