"""What many jobs cost beyond their own work: one by one, in workers, and on a local Ray cluster.

    python benchmarks/jobs.py demo sleep empty     # needs the extras dev and ray
    python benchmarks/jobs.py table

Each part adds its numbers to results/jobs.json; `table` writes results/jobs.md from them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from em_core.demo.scenes import concept_scene, write_scene
from em_core.jobs.cluster import Cluster
from em_core.jobs.models import load_host

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "jobs.json"
JOBS, STEPS = 12, 20
CARDS, SLEEP, SLEEPERS = (6, 5, 5), 30.0, 80
EMPTY, LOOK = 10_000, 1000
PAPER_CARDS, PAPER_JOBS, JOB_MINUTES = 100, 100_000, 5.0


def never() -> bool:
    return False


def sleep(seconds: float, stop: Callable[[], bool]) -> int:
    time.sleep(seconds)
    return os.getpid()


def nothing(item: int, stop: Callable[[], bool]) -> int:
    return item


@contextmanager
def nodes(cards: tuple[int, ...], cpus: int = 8) -> Iterator[str]:
    """Start a local cluster of several nodes with logical cards, and give its address.

    Ray ends idle workers beyond a node's number of CPUs, so that number is logical too.
    """
    from ray.cluster_utils import Cluster as Nodes

    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Nodes(initialize_head=True, head_node_args={"num_cpus": cpus, "num_gpus": cards[0]})
        for count in cards[1:]:
            made.add_node(num_cpus=cpus, num_gpus=count)
    try:
        yield made.address
    finally:
        made.shutdown()


def write_jobs(folder: Path) -> Path:
    """Write a jobs file on scenes of the demo world."""
    lines = []
    for number in range(JOBS):
        scene = folder / f"scene_{number}"
        write_scene(concept_scene(number, "A"), scene)
        prompt = (scene / "prompt.txt").read_text().strip()
        settings = {"steps": STEPS, "masks": {"init_timesteps": 10}}
        picture = {"image": f"scene_{number}/image.png", "prompt": prompt, "settings": settings}
        lines.append(json.dumps({"name": f"job_{number}", **picture}))
    file = folder / "jobs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def timed_batch(file: Path, out: Path, *more: str) -> dict[str, float]:
    """Run the command, and return its wall time and the jobs' own seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "em_core", "batch", str(file), "--out", str(out), "--quiet"]
    subprocess.run([*command, *more], cwd=ROOT, check=True, capture_output=True)
    wall = time.monotonic() - began
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    return {"wall": wall, "work": sum(line["seconds"] for line in lines), "jobs": len(lines)}


def demo(folder: Path) -> dict[str, Any]:
    """The same demo jobs in each way; and each in a process of its own, which loads the model for it."""
    file = write_jobs(folder)
    found: dict[str, Any] = {"load": []}
    for _ in range(3):
        began = time.monotonic()
        load_host("demo")
        found["load"].append(time.monotonic() - began)
    found["plain"] = timed_batch(file, folder / "plain")
    found["workers"] = timed_batch(file, folder / "workers", "--workers", "2")
    with nodes((1, 1)) as address:
        ray = ["--ray", address, "--gpus-per-job", "1"]
        found["ray"] = timed_batch(file, folder / "ray", *ray)
    one = folder / "one.jsonl"
    apart = []
    for line in file.read_text().splitlines()[:4]:
        one.write_text(line + "\n")
        apart.append(timed_batch(one, folder / "apart"))
    found["apart"] = {
        "wall": sum(one["wall"] for one in apart),
        "work": sum(one["work"] for one in apart),
        "jobs": len(apart),
    }
    return found


def sleeping(folder: Path) -> dict[str, Any]:
    """Jobs that only sleep, on 16 logical cards of three nodes, once the workers are up."""
    with nodes(CARDS) as address:
        cluster = Cluster(address, gpus=1)
        began = time.monotonic()
        started: set[int] = set()
        while len(started) < sum(CARDS):  # tasks long enough that no worker gets two of them
            started |= set(dict(indexed(cluster, [5.0] * sum(CARDS))).values())
        up = time.monotonic()
        used = set(dict(indexed(cluster, [SLEEP] * SLEEPERS)).values())
        wall = time.monotonic() - up
        cluster.close()
    return {
        "cards": sum(CARDS),
        "nodes": len(CARDS),
        "jobs": SLEEPERS,
        "seconds": SLEEP,
        "start": up - began,
        "wall": wall,
        "workers": len(used),
        "efficiency": SLEEPERS * SLEEP / (sum(CARDS) * wall),
    }


def indexed(cluster: Cluster, items: list[float]) -> Iterator[tuple[int, int]]:
    for number, (_, result) in enumerate(cluster.map(sleep, items, never)):
        yield number, result


def empty(folder: Path) -> dict[str, Any]:
    """Tasks that do nothing: what one costs, and how the driver's memory goes."""
    with nodes((0,), 2) as address:
        cluster = Cluster(address, gpus=0)
        list(cluster.map(nothing, range(50), never))
        memory, began = [resident()], time.monotonic()
        for done, _ in enumerate(cluster.map(nothing, iter(range(EMPTY)), never), start=1):
            if done % LOOK == 0:
                memory.append(resident())
        seconds = time.monotonic() - began
        cluster.close()
    return {"tasks": EMPTY, "seconds": seconds, "per_task": seconds / EMPTY, "memory": memory}


def resident() -> float:
    """Return this process's memory in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def per_job(run: Mapping[str, float], slots: int = 1) -> float:
    """Return what a job costs beyond its own work, in seconds of one slot."""
    return (run["wall"] * slots - run["work"]) / run["jobs"]


def table(found: Mapping[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Many jobs",
        "",
        "By `benchmarks/jobs.py`, on two CPU cores. Where the load is far above their number, other work was "
        "using them at the same time; it is told with each part. "
        "No graphics card was used: cards are logical, which is what a scheduler counts.",
    ]
    if "demo" in found:
        lines += demo_lines(found["demo"])
    if "sleep" in found:
        lines += sleep_lines(found["sleep"])
    if "empty" in found:
        lines += empty_lines(found["empty"])
        lines += paper_lines(found)
    return "\n".join(lines) + "\n"


def demo_lines(found: Mapping[str, Any]) -> list[str]:
    load = statistics.median(found["load"])
    lines = [
        "",
        "## Demo jobs",
        "",
        f"{JOBS} jobs of {STEPS} steps on the demo model, one thread each. *Beyond its work* is the time of a slot "
        "that is not a job's own, start of the processes included, per job.",
        "",
        "| way | slots | wall, s | a job's own, s | jobs an hour | beyond its work, s a job |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ways = (
        ("plain", "one by one, model loaded once", 1),
        ("workers", "--workers 2", 2),
        ("ray", "--ray, two nodes of one logical card", 2),
        ("apart", "a process and a load for each job", 1),
    )
    for name, title, slots in ways:
        run = found[name]
        lines.append(
            f"| {title} | {slots} | {run['wall']:.1f} | {run['work'] / run['jobs']:.2f} | "
            f"{3600 * run['jobs'] / run['wall']:.0f} | {per_job(run, slots):.2f} |"
        )
    return [
        *lines,
        "",
        f"Loading the demo model takes {load:.2f} s (median of 3, libraries imported); a process of its own also "
        f"imports them. Load average at the end: {found['load_average']:.1f} on {found['cores']} cores.",
    ]


def sleep_lines(found: Mapping[str, Any]) -> list[str]:
    return [
        "",
        "## Sleeping jobs on Ray",
        "",
        f"{found['jobs']} jobs that sleep {found['seconds']:g} s on {found['cards']} logical cards of "
        f"{found['nodes']} local nodes. The workers were up after {found['start']:.1f} s; from then on it took "
        f"{found['wall']:.1f} s in {found['workers']} worker processes, where "
        f"{found['jobs'] * found['seconds'] / found['cards']:.0f} s is the least: an efficiency of "
        f"{found['efficiency']:.1%}. Load average at the end: {found['load_average']:.1f}.",
    ]


def empty_lines(found: Mapping[str, Any]) -> list[str]:
    memory = ", ".join(f"{value:.0f}" for value in found["memory"])
    return [
        "",
        "## Empty tasks on Ray",
        "",
        f"{found['tasks']:,} tasks that do nothing, on two logical cores: {found['seconds']:.1f} s, "
        f"{1000 * found['per_task']:.2f} ms a task. The driver's memory at the start and after each {LOOK:,}, in "
        f"MiB: {memory}. Load average at the end: {found['load_average']:.1f}.",
    ]


def paper_lines(found: Mapping[str, Any]) -> list[str]:
    cost = found["empty"]["per_task"]
    hours = PAPER_JOBS * JOB_MINUTES / 60 / PAPER_CARDS
    rate = PAPER_CARDS / (60 * JOB_MINUTES)
    saves = PAPER_CARDS / 20
    return [
        "",
        "## A hundred cards and a hundred thousand jobs, on paper",
        "",
        "Nobody has run this; it follows from the numbers above. "
        f"{PAPER_JOBS:,} jobs of {JOB_MINUTES:g} minutes on {PAPER_CARDS} cards are {hours:.0f} hours of work. "
        f"The driver has to give out {rate:.2f} tasks a second and can give out {1 / cost:.0f}, which keeps it "
        f"busy for {rate * cost:.2%} of the time. What breaks first is not the driver but the shared folder: "
        f"each card saves a state every 20 s, which is {saves:.0f} files a second, each with an fsync (of tokens "
        f"some tens of kB; of a LoRA of 50 MB, {saves * 0.05:.2f} GB a second together), and the index reads a "
        f"small file of each finished job, {PAPER_JOBS:,} at the end, though in no more than a twentieth of the "
        "time. Next comes one folder with as many entries as there are jobs, then all machines that load the "
        "model from one place at the start.",
    ]


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "demo": demo,
    "sleep": sleeping,
    "empty": empty,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "table"))
    for part in parser.parse_args().parts:
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if part == "table":
            RESULTS.with_suffix(".md").write_text(table(found))
            continue
        with tempfile.TemporaryDirectory() as folder:
            numbers = PARTS[part](Path(folder))
        here = {"load_average": os.getloadavg()[0], "cores": os.cpu_count()}
        found[part] = {**numbers, **here}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(part, json.dumps(found[part]))


if __name__ == "__main__":
    main()
