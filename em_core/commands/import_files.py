"""`python -m em_core import`: embeddings and LoRAs of other programs as concepts."""

import argparse
from pathlib import Path

from ..errors import UserError
from ..exchange.importing import concept_of_embedding, holds_lora
from ..exchange.pickles import refuse_pickle
from ..runs.concept_set import ConceptSet
from .common import add_model, load_host, require_folder
from .writing import add_output_options, require_new, say

EXAMPLE = """examples:
  python -m em_core import --file dog.safetensors --name rex --words dog --out rex.safetensors
  python -m em_core import --file my_lora.safetensors --name rex --words "sks dog" --out rex.safetensors
  python -m em_core import --file output/exported/rex_00001.safetensors --name rex --out rex.safetensors"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `import` command."""
    parser = subparsers.add_parser(
        "import",
        help="make a concept of another program's embedding or LoRA",
        description="Make a concept file of an embedding or a LoRA (.safetensors), to draw with it, or to find "
        "its masks in pictures (masks --concepts). Pickled files are refused, with the command that converts them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--file", type=Path, required=True, help="the embedding or LoRA")
    parser.add_argument("--name", required=True, help="name of the concept, for <name> in prompts")
    parser.add_argument(
        "--words",
        default="",
        help="a LoRA's trigger words, as its page tells them (default: those that the file tells, where `export` "
        "wrote it); or the words an embedding stands for, if any",
    )
    parser.add_argument("--out", type=Path, required=True, help="the concepts file to write")
    add_output_options(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write the concept file."""
    refuse_pickle(args.file)
    is_lora = holds_lora(args.file)
    require_target(args.out, args.overwrite)
    host = load_host(args.model, args.device, args.dtype)
    if is_lora:
        from ..hosts.lora_files import concept_of_lora

        concepts = concept_of_lora(host, args.file, args.name, args.words)
    else:
        concepts = concept_of_embedding(args.file, args.name, args.words, host.identity())
    concepts.save(args.out)
    say(args, f"{described(concepts)} Written to {args.out}.")
    return 0


def require_target(out: Path, overwrite: bool) -> None:
    """Fail before the work starts if the file cannot be written, or is there already.

    Raises:
        UserError: that is so.
    """
    if out.is_dir():
        raise UserError(
            f"{out} is a folder. Expected the file to write, as in {out / 'rex.safetensors'}."
        )
    require_new([out], overwrite)
    require_folder(out.absolute().parent)


def described(concepts: ConceptSet) -> str:
    """Return a line on a concept that was made of a file."""
    ((concept, by_encoder),) = concepts.vectors.items()
    count = len(next(iter(by_encoder.values())))
    words = concepts.concepts[0].words
    weights = f" and {len(concepts.weights)} tensors of weights" if concepts.weights else ""
    called = f", from the words {words!r}" if words else ""
    return f"<{concept}> has {count} token vector{'s' * (count > 1)}{weights}{called}."
