"""`python -m em_core batch`: many jobs, one after the other, in several processes, or on a cluster."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..jobs.batch import TRY_AGAIN, Batch
from ..jobs.cluster import Cluster
from ..jobs.executors import Executor, OneByOne
from ..jobs.folder import BatchFolder
from ..jobs.index import Entry
from ..jobs.job import Job
from ..jobs.perform import AGAIN, DONE, FAILED, FOUND, Outcome
from ..jobs.reading import read_jobs
from ..jobs.workers import Workers, card_environments
from ..runs.runner import stop_on_signal
from . import options
from .common import add_model, load_tqdm, require_folder
from .writing import add_quiet, say

EXAMPLE = """examples:
  python -m em_core batch jobs.jsonl --out output/batch
  python -m em_core batch pictures --out output/batch --defaults '{"joint": {"kind": "lora"}, "export": true}'
  python -m em_core batch jobs.jsonl --out /shared/batch --device cuda --ray auto --gpus-per-job 0.5

A folder of pictures has the prompt of rex.png in rex.txt. The same command goes on with what is not done.
Exit status: 0 all is done, 2 some jobs cannot be done, 75 try again (130 after Ctrl-C)."""
SHARD = re.compile(r"(\d{1,6})/(\d{1,6})")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `batch` command."""
    parser = subparsers.add_parser(
        "batch",
        help="do many jobs: learn, find masks, draw and evaluate",
        description="Do many independent jobs, each once, and keep an index of what came of them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "jobs", type=Path, help="a file with one JSON object a line, or a folder of pictures"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results, which machines may share"
    )
    parser.add_argument(
        "--defaults",
        default="{}",
        help="fields of jobs that do not have them, as a JSON object or a file with one",
    )
    add_executors(parser)
    parser.add_argument(
        "--threads",
        type=options.positive,
        default=1,
        help="CPU threads of a job that does not say; another number is another job (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do part I of N alone, I from 0 to N-1, as for a job array",
    )
    parser.add_argument(
        "--retries",
        type=options.whole(0),
        default=3,
        help="how often a job is tried again after a fault that passes, such as of a network or a lost worker; "
        "never after bad input (default: %(default)s)",
    )
    add_quiet(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def add_executors(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where jobs are done."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers",
        type=options.positive,
        help="do so many jobs at a time, in processes of this machine",
    )
    where.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="do jobs on a Ray cluster: auto is the one of this machine, local starts one here",
    )
    parser.add_argument(
        "--gpus-per-job",
        type=options.not_negative,
        help="cards of a job on a Ray cluster, such as 1 or 0.5 (default: 1 where the device is a card)",
    )


def shard(text: str) -> tuple[int, int]:
    """Parse `I/N`; an argparse type."""
    match = SHARD.fullmatch(text)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if found[0] >= found[1]:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N-1, got {text!r}")
    return found


def run_command(args: argparse.Namespace) -> int:
    """Do the jobs, and say what came of them."""
    if args.gpus_per_job is not None and args.ray is None:
        raise UserError("--gpus-per-job is of a Ray cluster. Add --ray, or leave it out.")
    jobs = read_jobs(args.jobs, defaults_of(args))
    end = ""
    if args.shard is not None:
        part, parts = args.shard
        jobs, end = jobs[part::parts], f"_{part}_of_{parts}"
    require_folder(args.out)
    root = args.out.absolute()
    bar = Bar(len(jobs), args.quiet)
    executor = executor_of(args, jobs)
    try:
        with stop_on_signal() as stop:
            batch = Batch(jobs, BatchFolder(root), executor, stop, bar.take, args.retries, end)
            status = batch.run()
    finally:
        bar.close()
        executor.close()
    report(args, batch, end, status)
    return stop.status if stop() and status == TRY_AGAIN else status


def defaults_of(args: argparse.Namespace) -> Mapping[str, Any]:
    """Return the fields of jobs that do not have them.

    Raises:
        UserError: they are no JSON object.
    """
    text = args.defaults
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(
            f'Could not read --defaults ({error}). Expected a JSON object such as {{"kind": "learn"}}, or a '
            "file with one."
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"Bad --defaults. Expected a JSON object, got {text[:60]!r}.")
    model = {"model": args.model, "device": args.device, "dtype": args.dtype}
    return {**model, "threads": args.threads, **found}


def executor_of(args: argparse.Namespace, jobs: Sequence[Job]) -> Executor:
    """Return what carries the jobs out.

    Raises:
        UserError: there is no such cluster.
    """
    threads = max(job.threads for job in jobs) if jobs else 1
    on_cards = any(job.model.device_type != "cpu" for job in jobs)
    if args.workers is not None:
        device = "cuda" if any(job.model.device == "cuda" for job in jobs) else ""
        return Workers(args.workers, threads, card_environments(args.workers, device))
    if args.ray is not None:
        gpus = args.gpus_per_job if args.gpus_per_job is not None else float(on_cards)
        return Cluster(args.ray, gpus=gpus, threads=threads, retries=args.retries)
    return OneByOne()


class Bar:
    """Shows how many jobs are done, how long the rest will take, and what goes wrong."""

    def __init__(self, count: int, quiet: bool) -> None:
        self.bar = None if quiet else load_tqdm()(total=count, unit="job")
        self.counted: set[int] = set()
        self.counts: Counter[str] = Counter()

    def take(self, entry: Entry, outcome: Outcome) -> None:
        """Count a job, and say what went wrong with it."""
        if outcome.error:
            self.write(f"{entry.name}: {outcome.error}")
        if self.bar is None or outcome.status in AGAIN or id(entry) in self.counted:
            return
        self.counted.add(id(entry))
        self.counts[outcome.status] += 1
        self.bar.set_postfix(self.counts, refresh=False)
        self.bar.update()

    def write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            sys.stderr.write(line + "\n")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def report(args: argparse.Namespace, batch: Batch, end: str, status: int) -> None:
    """Say what came of a batch, and where it is."""
    counts = Counter(entry.status or "not begun" for entry in batch.entries)
    parts = [f"{counts.pop(DONE, 0)} done", f"{counts.pop(FOUND, 0)} found again"]
    parts += [f"{count} {name}" for name, count in sorted(counts.items())]
    line = f"{', '.join(parts)}. Index: {batch.folder.root / f'index{end}.csv'}"
    if status:
        sys.stdout.write(f"{line}\n")
    else:
        say(args, line)
    if batch.halted is not None:
        sys.stderr.write(f"Ended early. {batch.halted.error}\n")
    if status == TRY_AGAIN:
        sys.stderr.write("To go on, give the same command again.\n")
    elif counts.get(FAILED):
        sys.stderr.write(
            "The index says why jobs failed. Once that is mended, give the same command again.\n"
        )
