"""The command line: `python -m em_core COMMAND`, with the commands of the folder commands."""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .commands import (
    batch,
    dataset,
    demo,
    discover,
    evaluate,
    export,
    generate,
    import_files,
    learn,
    masks,
    refine,
    scene,
)
from .commands.writing import RULE
from .errors import OUT_OF_MEMORY, Notice, TrainingError, UserError, is_passing

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h, which schedulers take for a reason to start anew
COMMANDS = (
    demo,
    scene,
    discover,
    learn,
    masks,
    generate,
    evaluate,
    batch,
    refine,
    export,
    import_files,
    dataset,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    An error meant for the user becomes one line on stderr and exit status 2, or 75 if the same command may
    work at another time, as where a disk is full. Ctrl-C gives 130, a request to end 75.
    """
    parser = argparse.ArgumentParser(
        prog="python -m em_core",
        description="Learn visual concepts and their masks from a few pictures.",
        epilog=RULE,
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        with plain_warnings():
            return args.run(args)
    except (UserError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        return TRY_AGAIN if is_passing(error) else 2
    except OUT_OF_MEMORY:
        sys.stderr.write(
            "error: Out of memory on the device. Use a smaller picture or --device cpu.\n"
        )
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Stopped.\n")
        return 130


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show what users should know as one line each, without the place in the code it comes from."""

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Notice):
            sys.stderr.write(f"warning: {message}\n")
        else:
            before(message, category, *place, **more)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


if __name__ == "__main__":
    sys.exit(main())
