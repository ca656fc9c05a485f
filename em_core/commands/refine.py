"""`python -m em_core refine`: sharpen masks with the DenseCRF."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from ..masks.crf import PRESETS, CRFSettings, MaskRefiner, labels
from ..masks.crf.pydensecrf_backend import load
from ..masks.resizing import resize
from ..pictures import read_mask, read_picture, save_mask
from .common import add_device, require_folder, torch_device

EXAMPLE = """examples:
  python -m em_core refine --image photo.png --mask mask_cat.png mask_dog.png --out output/refined
  python -m em_core refine --image photo.png --mask masks/*.png --out output/refined --working-size 256"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "refine",
        help="sharpen masks along the edges of a picture",
        description=(
            "Refine masks of one picture with a fully connected CRF. Masks are read from the first "
            "channel, over 127; those of another size are fitted to the picture."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--mask", type=Path, nargs="+", required=True, help="one file a mask")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for PNG files of the masks' names"
    )
    parser.add_argument(
        "--backend",
        choices=("torch", "pydensecrf"),
        default="torch",
        help="what solves it (%(default)s); pydensecrf has to be installed",
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="cutler", help="set of numbers (%(default)s)"
    )
    parser.add_argument("--iterations", type=int, help="mean-field updates; otherwise the preset's")
    parser.add_argument(
        "--working-size", type=int, help="longer side to solve at, such as 256; otherwise full size"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="refine each mask alone; refined masks may then overlap",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the refined masks."""
    settings = settings_of(args)
    if settings.backend == "pydensecrf":
        load()
    targets = output_files(args.mask, args.out)
    picture = read_picture(args.image).to(torch_device(args.device))
    refiner = MaskRefiner(picture, settings)
    size = (picture.shape[-2], picture.shape[-1])
    masks = torch.cat([resize(read_mask(file)[None].float(), size, "mask") for file in args.mask])
    require_folder(args.out)
    refined = labels(refiner(masks), settings.joint)
    for target, mask in zip(targets, refined.cpu(), strict=True):
        save_mask(target, mask)
    return 0


def settings_of(args: argparse.Namespace) -> CRFSettings:
    """The preset with the options that were given."""
    settings = replace(
        PRESETS[args.preset],
        backend=args.backend,
        joint=not args.alone,
        working_size=args.working_size,
    )
    return settings if args.iterations is None else replace(settings, iterations=args.iterations)


def output_files(masks: Sequence[Path], folder: Path) -> list[Path]:
    """Where each mask's refinement goes: its own name, as PNG.

    Raises:
        UserError: two masks would share a file, or a mask would be written over.
    """
    targets = [folder / f"{mask.stem}.png" for mask in masks]
    double = next((target for target in targets if targets.count(target) > 1), None)
    if double is not None:
        raise UserError(
            f"Two masks would be written to {double}. Expected masks of different names."
        )
    inputs = {mask.resolve() for mask in masks}
    for target in targets:
        if target.resolve() in inputs:
            raise UserError(f"{target} is one of the given masks. Choose another --out folder.")
    return targets
