"""`python -m em_core generate`: draw pictures of learned concepts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..hosts.text import require_learned
from ..pictures import save_image, to_image
from ..prompts import ConceptPrompt, require_use
from ..runs.concept_set import ConceptSet
from ..runs.visual_condition import VisualCondition
from ..show.drawing import sheet
from . import options
from .common import (
    add_any_weights,
    add_guidance,
    add_model,
    load_host,
    require_folder,
)
from .visual import add_drawing_options, condition_of
from .writing import add_output_options, require_new, say, written

GRID = "grid.png"
EXAMPLE = """example:
  python -m em_core generate --concepts output/learned/concepts.safetensors \\
      --prompt "a photo of <rex> and <doll> on sand" --out output/generated"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `generate` command."""
    parser = subparsers.add_parser(
        "generate",
        help="draw pictures of learned concepts",
        description="Draw pictures from prompts that contain learned concepts, written as <name>.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--concepts",
        type=options.concepts,
        help="a concepts.safetensors file, or its folder (default: those of --condition)",
    )
    add_drawing_options(parser)
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--count",
        type=options.positive,
        default=4,
        help="pictures per prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="seed of the first picture; each further picture adds 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=options.positive, default=30, help="sampling steps (default: %(default)s)"
    )
    add_guidance(parser)
    add_output_options(parser)
    add_any_weights(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write one PNG per picture, and grid.png."""
    condition = VisualCondition.load(args.condition) if args.condition else None
    concepts = ConceptSet.load(args.concepts) if args.concepts else None
    used = condition.concepts if condition and not concepts else concepts
    prompts = prompts_of(args.prompt, used)
    seeds = range(args.seed, args.seed + args.count)
    names = {
        (number, seed): f"prompt_{number}_seed_{seed}.png"
        for number in range(1, len(prompts) + 1)
        for seed in seeds
    }
    require_new([args.out / name for name in (*names.values(), GRID)], args.overwrite)
    host = load_host(args.model, args.device, args.dtype)
    for learned in (concepts, condition and condition.concepts):
        if learned:
            learned.require_fit(host.identity(), any_weights=args.any_weights)
    require_folder(args.out)
    condition, seen = condition_of(args, condition, host), (args.strength, tuple(args.span))
    pages: list[Sequence[Image.Image]] = []
    for prompt in prompts:
        pictures = host.generate(
            prompt, concepts, seeds, args.steps, args.guidance, None, condition, *seen
        )
        pages.append([to_image(picture) for picture in pictures])
    for number, images in enumerate(pages, start=1):
        for seed, image in zip(seeds, images, strict=True):
            save_image(args.out / names[number, seed], image)
    rows = {str(prompt): images for prompt, images in zip(prompts, pages, strict=True)}
    save_image(args.out / GRID, sheet(rows, [f"seed {seed}" for seed in seeds]))
    say(args, written(args.out, [GRID, *names.values()]))
    return 0


def prompts_of(texts: Sequence[str], concepts: ConceptSet | None) -> list[ConceptPrompt]:
    """Read the prompts to draw learned concepts with.

    Raises:
        UserError: there are no concepts; or a prompt is malformed, marks a concept that was not learned, or
            names one as a plain word where none is marked.
    """
    if concepts is None:
        raise UserError(
            "Nothing to draw. Give --concepts, a file of learned concepts, or --condition."
        )
    prompts = [ConceptPrompt.parse(text) for text in texts]
    for prompt in prompts:
        require_learned(prompt, concepts.vectors)
    require_use(prompts, concepts.names)
    return prompts
