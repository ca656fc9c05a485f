"""`python -m em_core scene`: render a scene of the demo world with two new concepts."""

import argparse
from pathlib import Path

_DESCRIPTION = """\
Render a 64 x 64 picture of two objects that the demo model has not seen, with their true masks.

Set A: new combinations of known shapes, colours and patterns. Set B: known shapes in new colours
and new patterns. Set C: new shapes, called "thing". The same seed gives the same scene.

Writes image.png, mask_<concept>.png (white where the concept is visible) and prompt.txt.
"""
_EXAMPLE = "example:\n  python -m em_core scene --seed 7 --set B --out output/scene"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `scene` command."""
    parser = subparsers.add_parser(
        "scene",
        help="render a demo picture with two new concepts and their true masks",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, required=True, help="chooses the scene; 0 or more")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument(
        "--set", choices=("A", "B", "C"), default="A", help="see above (default: A)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Render the scene of `args.seed` and `args.set` into the folder `args.out`."""
    from em_core.demo.scenes import concept_scene, write_scene

    write_scene(concept_scene(args.seed, args.set), args.out)
    return 0
