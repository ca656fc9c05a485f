"""What the commands write, and what they say of it: no file is replaced unasked, and each is named."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError

RULE = (
    "No command replaces a file unasked: where one that it would write is there already, it ends with an error "
    "before it does anything, unless --overwrite is given. export numbers its files instead; learn --resume, batch "
    "and evaluate go on with what their folder holds. A command says at its end what it has written and found; "
    "with --quiet, it says nothing but warnings and errors."
)
MOST = 6


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite` and `--quiet`."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that are there already; otherwise they are an error",
    )
    add_quiet(parser)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")


def require_new(files: Iterable[Path], overwrite: bool) -> None:
    """Refuse to replace files that are there, unless that is asked for.

    Raises:
        UserError: one of them is there.
    """
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        are = "is" if len(there) == 1 else "are"
        raise UserError(
            f"{listed(there)} {are} there already. Choose another --out, or add --overwrite to replace what has "
            "the same name."
        )


def listed(names: Sequence[str]) -> str:
    """Return names in a line, or how many more there are than fit."""
    rest = len(names) - MOST
    return ", ".join(names) if rest <= 0 else f"{', '.join(names[:MOST])} and {rest} more"


def written(out: Path, names: Sequence[str]) -> str:
    """Return a line on what was written into a folder."""
    return f"Written to {out}: {listed(names)}."


def say(args: argparse.Namespace, *lines: str) -> None:
    """Say what a command has done, unless it is to be quiet; empty lines are left out."""
    if not args.quiet:
        sys.stdout.write("".join(f"{line}\n" for line in lines if line))
        sys.stdout.flush()
