"""Jobs on scenes of the demo world, for the tests of batches."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from em_core.demo.scenes import concept_scene, write_scene

SHORT = {"steps": 3, "e_step_every": 2, "masks": {"init_timesteps": 6}}
LONGER = {"steps": 8, "e_step_every": 4, "masks": {"init_timesteps": 6}}


def job(folder: Path, number: int, **more: Any) -> dict[str, Any]:
    """A job that learns from a scene, which is written next to the jobs file."""
    scene = folder / f"scene_{number}"
    if not scene.exists():
        write_scene(concept_scene(number, "A"), scene)
    made = {
        "name": f"job_{number}",
        "image": f"{scene.name}/image.png",
        "prompt": (scene / "prompt.txt").read_text().strip(),
        "truth": scene.name,
        "settings": SHORT,
    }
    return {**made, **more}


def write_jobs(folder: Path, jobs: list[Any]) -> Path:
    """Write a jobs file; texts are written as they are."""
    file = folder / "jobs.jsonl"
    file.write_text("".join(f"{j if isinstance(j, str) else json.dumps(j)}\n" for j in jobs))
    return file


def index_of(out: Path) -> dict[str, dict[str, Any]]:
    """The index by the jobs' names."""
    lines = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    return {line["name"]: line for line in lines}


def contents(out: Path, line: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a finished job, but for its record, which tells how long it took and where."""
    folder = out / line["folder"]
    return {name: (folder / name).read_bytes() for name in line["files"]}


def same_results(one: Path, other: Path, *, keys: bool = True) -> int:
    """Compare the results of two batches bit for bit, and return how many jobs they have."""
    a, b = index_of(one), index_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name]["status"] == b[name]["status"], (name, a[name], b[name])
        if a[name]["status"] == "done":
            assert not keys or a[name]["key"] == b[name]["key"]
            assert contents(one, a[name]) == contents(other, b[name]), name
    return len(a)


def no_leftovers(out: Path) -> None:
    """Nothing is left under way, and no file that was being written."""
    assert not (out / "work").exists() or not list((out / "work").iterdir())
    assert not [path for path in out.rglob(".*") if path.is_file()]


# Work for executors


def square(item: int, stop: Callable[[], bool]) -> tuple[int, int, str]:
    return item * item, os.getpid(), os.environ.get("OMP_NUM_THREADS", "")


def die_of_three(item: int, stop: Callable[[], bool]) -> int:
    if item == 3:
        os._exit(7)
    return item


def wait_for_stop(item: Path, stop: Callable[[], bool]) -> str:
    """Say in a file which process this is, and wait."""
    item.write_text(str(os.getpid()))
    while not stop():
        time.sleep(0.02)
    item.write_text("stopped")
    return "stopped"
