"""The run store and a batch's folder under several processes at once, some of which are killed.

    python tests/core/store_soak.py --minutes 10 --processes 8

Every result that is found must be that of its key, a result that was kept must be found at once, the store's
bounds must hold, and no job of the batch's folder may be done twice, or be lost. It ends with status 1 if
anything is wrong.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from em_core import ConceptSet, RunStore
from em_core.jobs.folder import BatchFolder
from em_core.model.identity import ModelIdentity
from em_core.prompts import Concept
from em_core.runs.store import MOST_FILES

KEYS, PAUSE = 200, 0.05


def result_of(key: str) -> ConceptSet:
    """A result that tells its key."""
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    vectors = {"rex": {"clip_l": torch.full((1, 64), float(seed % 10007))}}
    identity = ModelIdentity("sd1", key, {"clip_l": 64}, torch.arange(8.0))
    return ConceptSet((Concept("rex", "dog"),), vectors, identity)


def is_of(found: ConceptSet, key: str) -> bool:
    own = result_of(key)
    same = torch.equal(found.vectors["rex"]["clip_l"], own.vectors["rex"]["clip_l"])
    return same and found.identity.architecture == key


def use_store(store: RunStore, number: int) -> tuple[str, str]:
    """Look a key up, or keep its result; return what was done and what is wrong."""
    key = f"key{random.randrange(KEYS)}"  # noqa: S311
    found = store.finished(key)
    if found is not None:
        return "found", "" if is_of(found, key) else f"{key} has the result of another key"
    store.keep(key, result_of(key))
    again = store.finished(key)
    if again is None:
        return "kept", f"{key} was kept and is not found"
    return "kept", "" if is_of(again, key) else f"{key} has the result of another key"


def use_folder(folder: BatchFolder, log: Path, key: str) -> str:
    """Do a job of a batch if nobody has, and note in a log that it was done."""
    if folder.finished(key):
        return "found"
    with folder.claimed(key) as mine:
        if not mine:
            return "busy"
        if folder.finished(key):
            return "found"
        made = folder.work(key) / "made"
        shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
        made.mkdir(parents=True)
        (made / "result.txt").write_text(key)
        time.sleep(PAUSE)
        folder.publish(key, made, {"kind": "learn", "seconds": 0.0})
        with log.open("a") as file:
            file.write(f"{key}\n")
    return "done"


def serve(root: Path, number: int, until: float) -> None:
    """One process: use both until the time is up, and log each deed and each fault."""
    random.seed(f"{number} {os.getpid()}")
    store, folder = RunStore(root / "store"), BatchFolder(root / "batch")
    counts: Counter[str] = Counter()
    mine = root / f"process_{os.getpid()}.txt"
    while time.monotonic() < until:
        did, wrong = use_store(store, number)
        counts[did] += 1
        if wrong:
            with (root / "wrong.txt").open("a") as file:
                file.write(wrong + "\n")
        window = int(time.monotonic() * 2)  # all processes want the same few jobs at a time
        counts[use_folder(folder, root / "log.txt", f"job{window * 4 + random.randrange(4)}")] += 1  # noqa: S311
        mine.write_text(" ".join(f"{name}:{count}" for name, count in counts.items()))
        time.sleep(PAUSE)


def soak(root: Path, minutes: float, processes: int, kill_every: float) -> int:
    """Run the processes, kill one now and then, and say what came of it."""
    context = multiprocessing.get_context("fork")
    until = time.monotonic() + 60 * minutes
    started = [context.Process(target=serve, args=(root, n, until)) for n in range(processes)]
    for process in started:
        process.start()
    kills, most, next_kill = 0, 0, time.monotonic() + kill_every
    while time.monotonic() < until:
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            most = max(most, len(list((root / "store").glob("[!.]*.safetensors"))))
        if time.monotonic() > next_kill:
            number = random.randrange(processes)  # noqa: S311
            if not started[number].is_alive():
                raise SystemExit("A process has ended by itself.")
            os.kill(started[number].pid or 0, signal.SIGKILL)
            started[number].join()
            started[number] = context.Process(target=serve, args=(root, number, until))
            started[number].start()
            kills, next_kill = kills + 1, time.monotonic() + kill_every
    for process in started:
        process.join()
    return report(root, kills, most, processes)


def report(root: Path, kills: int, most: int, processes: int) -> int:
    """Say the figures; return 1 if anything is wrong."""
    wrong = (root / "wrong.txt").read_text().splitlines() if (root / "wrong.txt").exists() else []
    store, folder = RunStore(root / "store"), BatchFolder(root / "batch")
    store.keep("last", result_of("last"))
    left = len(list((root / "store").glob("[!.]*.safetensors")))
    for file in (root / "store").glob("[!.]*.concepts.safetensors"):
        key = file.name.partition(".")[0]
        found = store.finished(key)
        if found is None or not is_of(found, key):
            wrong.append(f"{key} cannot be read at the end")
    done = Counter((root / "log.txt").read_text().split())
    results = {path.name for path in (root / "batch" / "results").iterdir()}
    twice = [key for key, count in done.items() if count > 1]
    torn = [key for key in results if folder.finished(key) is None]
    lost = [key for key in done if key not in results]
    counts: Counter[str] = Counter()
    for file in root.glob("process_*.txt"):
        for part in file.read_text().split():
            name, _, count = part.partition(":")
            counts[name] += int(count)
    sys.stdout.write(
        f"{processes} processes, {kills} killed. Store: {counts['kept']} kept, {counts['found']} found again, at "
        f"most {most} files at a look, {left} at the end (bound {MOST_FILES}). Batch: {len(results)} results, "
        f"{sum(done.values())} logged, {len(twice)} twice, {len(lost)} lost, {len(torn)} not whole. "
        f"{len(wrong)} other faults.\n"
    )
    for line in [*wrong, *twice, *torn, *lost][:20]:
        sys.stdout.write(line + "\n")
    bounded = left <= MOST_FILES and most <= MOST_FILES + processes
    return 0 if bounded and not (wrong or twice or torn or lost) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds between kills")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        sys.exit(soak(Path(made), args.minutes, args.processes, args.kill_every))
