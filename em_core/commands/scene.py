"""`python -m em_core scene`: render a scene of the demo world with two new concepts."""

import argparse
from pathlib import Path

from ..demo.scenes import SETS, ConceptPicture, ConceptScene, concept_scene, write_scene
from ..jobs.outputs import mask_file
from . import options
from .common import require_folder
from .writing import add_output_options, require_new, say, written

_DESCRIPTION = """\
Render a 64 x 64 picture of objects that the demo model has not seen, with their true masks.

A: two new combinations of known shapes, colours and patterns. B: two known shapes in new colours
and new patterns. C: two new shapes, both called by one generic word. D: the scenes of C, without
words. E: two of a kind. F: four concepts. G: clutter, some of it not named. H: two pictures with a
concept in common. I: two objects that touch, and the background as a concept. J: two of a kind, and
a bystander that is not named.
The same seed gives the same scene.

Writes image.png, mask_<concept>.png (white where the concept is visible) and prompt.txt; for set H
into the folders 1 and 2.
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
    parser.add_argument(
        "--seed", type=options.seed, required=True, help="chooses the scene; 0 or more"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--set", choices=SETS, default="A", help="see above (default: A)")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Render the scene of `args.seed` and `args.set` into the folder `args.out`."""
    scene = concept_scene(args.seed, args.set)
    files = files_of(scene)
    require_new([args.out / file for file in files], args.overwrite)
    require_folder(args.out)
    write_scene(scene, args.out)
    prompts = [f"Prompt: {picture.prompt}" for picture in scene.pictures]
    say(args, *prompts, written(args.out, files))
    return 0


def files_of(scene: ConceptScene) -> list[str]:
    """Return the files that a scene is written to; those of several pictures are in folders 1 and 2."""
    if len(scene.pictures) == 1:
        return names_of(scene.only)
    return [
        f"{number}/{name}"
        for number, picture in enumerate(scene.pictures, start=1)
        for name in names_of(picture)
    ]


def names_of(picture: ConceptPicture) -> list[str]:
    return ["image.png", *map(mask_file, picture.masks), "prompt.txt"]
