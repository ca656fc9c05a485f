"""Command line: `python -m em_core scene|learn|masks|generate|refine|demo`."""

import argparse
import sys
from collections.abc import Sequence

from .commands import demo, generate, learn, masks, refine, scene
from .errors import TrainingError, UserError

COMMANDS = (demo, scene, learn, masks, generate, refine)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors meant for the user become one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m em_core",
        description="Learn visual concepts and their masks from a few pictures.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (UserError, TrainingError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
