"""`python -m em_core export`: learned concepts as files for ComfyUI and other programs."""

import argparse
from pathlib import Path

from ..exchange.saving import RANK, numbered, require_name, save_exports
from ..runs.concept_set import ConceptSet
from . import options
from .common import add_model, load_host, require_folder
from .writing import add_quiet, say, written

DESCRIPTION = """\
Write learned concepts as plain safetensors files, and say which of them goes where:

  NAME.safetensors              for ComfyUI's models/loras: LoRA and tokens in one file, which stock
                                loaders and a plain trigger word use
  NAME_lora.safetensors         the LoRA without tokens, for diffusers, A1111 and kohya
  NAME_CONCEPT_FAMILY.safetensors   the tokens as embeddings
"""
EXAMPLE = """example:
  python -m em_core export --concepts output/learned/concepts.safetensors --name rex \\
      --triggers "rex: sks, doll: ohwx" --out output/exported"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `export` command."""
    parser = subparsers.add_parser(
        "export",
        help="write concepts as LoRA and embedding files for other programs",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--concepts",
        type=options.concepts,
        required=True,
        help="a concepts.safetensors file, or its folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument(
        "--name", default="concepts", help="name of the files (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write under the name itself and replace what is there; otherwise files are numbered",
    )
    parser.add_argument(
        "--triggers",
        default="",
        help="trigger words of your own, as in 'rex: sks, doll: ohwx olis': one for each vector; otherwise rare "
        "words are chosen that no other file in the folder uses",
    )
    parser.add_argument(
        "--rank",
        type=options.positive,
        default=RANK,
        help="rank of changed whole weights (cross_attention, full) in NAME_lora (default: %(default)s)",
    )
    parser.add_argument(
        "--any-weights",
        action="store_true",
        help="also accept a fine-tune of the model that the concepts were learned on; the tokens are exact on it",
    )
    add_quiet(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write the files and say on stdout which goes where."""
    require_name(args.name)
    concepts = ConceptSet.load(args.concepts)
    require_folder(args.out)
    host = load_host(args.model, args.device, args.dtype)
    concepts.require_fit(host.identity(), any_weights=args.any_weights)
    name = args.name if args.overwrite else numbered(args.name, [args.out])
    saved = save_exports(
        concepts, name, args.out, args.out, host.vocabularies(), args.triggers, args.rank
    )
    names = [file.name for file in saved.files(args.out, args.out)]
    say(args, saved.guide, written(args.out, names))
    return 0
