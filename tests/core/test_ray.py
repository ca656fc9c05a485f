"""Batches on a real Ray cluster of several nodes on this machine, with workers, a node and drivers killed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_files import (
    LONGER,
    die_of_three,
    index_of,
    job,
    no_leftovers,
    same_results,
    square,
    write_jobs,
)

from em_core.errors import UserError
from em_core.jobs.cluster import Cluster
from em_core.jobs.executors import Lost

ray = pytest.importorskip(
    "ray", reason='Install Ray to run jobs on a cluster: pip install -e ".[ray]"'
)
ROOT = Path(__file__).parents[2]
WORKER, MARK = "ray::carry_out", f"VISUAL_CONCEPTS_TEST={os.getpid()}"  # no other's workers
ENOUGH = 240.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head without cards, and two nodes with one logical card each; they find this checkout."""
    from ray.cluster_utils import Cluster as Nodes

    paths = os.pathsep.join(
        [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=paths, OMP_NUM_THREADS="1", RAY_enable_metrics_collection="0")
    os.environ["VISUAL_CONCEPTS_TEST"] = str(os.getpid())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
        for _ in range(2):
            made.add_node(num_cpus=2, num_gpus=1)
    try:
        yield made
    finally:
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


def command(file: Path, out: Path, *more: str) -> list[str]:
    given = ["batch", str(file), "--out", str(out), "--quiet", *more]
    return [sys.executable, "-m", "em_core", *given]


def on(nodes: Any) -> list[str]:
    return ["--ray", nodes.address, "--gpus-per-job", "1"]


def done_in(out: Path) -> int:
    return len(list((out / "results").iterdir())) if (out / "results").exists() else 0


def wait_until(true: Callable[[], bool], driver: Any = None) -> None:
    end = time.monotonic() + ENOUGH
    while not true():
        assert driver is None or driver.poll() is None, driver.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def workers() -> list[int]:
    """The processes that are doing tasks of ours now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                named = (entry / "cmdline").read_bytes().startswith(WORKER.encode())
                if named and MARK.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def survive(nodes: Any, folder: Path, count: int, trouble: list[str]) -> None:
    """Run a batch with trouble in between; all is done once, and as the plain loop does it."""
    rng = random.Random(count)  # noqa: S311
    file = write_jobs(folder, [job(folder, n, settings=LONGER) for n in range(count)])
    out, at = folder / "out", 0
    driver = subprocess.Popen(command(file, out, *on(nodes)), stderr=subprocess.PIPE, text=True)
    for number, what in enumerate(trouble, start=1):
        at = count * number // (len(trouble) + 1)
        wait_until(lambda at=at: done_in(out) >= at and bool(workers()), driver)  # type: ignore[misc]
        if what == "worker":
            os.kill(rng.choice(workers()), signal.SIGKILL)
        elif what == "node":
            nodes.remove_node(rng.choice(list(nodes.worker_nodes)), allow_graceful=False)
            nodes.add_node(num_cpus=2, num_gpus=1)
        else:
            driver.kill()
            driver.communicate()
            driver = subprocess.Popen(
                command(file, out, *on(nodes)), stderr=subprocess.PIPE, text=True
            )
    said = driver.communicate(timeout=2 * ENOUGH)[1]
    assert driver.returncode == 0, said
    subprocess.run(command(file, folder / "plain"), check=True)
    assert same_results(folder / "plain", out) == count
    no_leftovers(out)
    wait_until(lambda: not workers())


def test_a_worker_that_dies_loses_its_item_alone(nodes: Any) -> None:
    """After it was tried again; threads are the job's own, whatever the machine has."""
    cluster = Cluster(nodes.address, gpus=1.0, threads=3, retries=1)
    try:
        found = dict(cluster.map(die_of_three, range(6), never))
        squares = dict(cluster.map(square, range(6), never))
        stopped = dict(cluster.map(square, range(6), lambda: True))
    finally:
        cluster.close()
    assert {n for n, result in found.items() if isinstance(result, Lost)} == {3}
    assert all(found[n] == n for n in found if n != 3)
    assert {n: x[0] for n, x in squares.items()} == {n: n * n for n in range(6)}
    assert {x[2] for x in squares.values()} == {"3"} and not stopped


def never() -> bool:
    return False


@pytest.mark.slow
def test_killed_workers_and_drivers_lose_nothing(nodes: Any, tmp_path: Path) -> None:
    survive(nodes, tmp_path, 6, ["worker", "driver"])


@pytest.mark.slow
def test_forty_jobs_with_workers_a_node_and_drivers_killed(nodes: Any, tmp_path: Path) -> None:
    survive(nodes, tmp_path, 40, ["worker", "driver", "worker", "node", "worker", "driver"])


@pytest.mark.slow
def test_ctrl_c_on_a_cluster_leaves_what_goes_on(nodes: Any, tmp_path: Path) -> None:
    """Tasks stop after their step and keep their state; a bad job among them is told."""
    jobs = [job(tmp_path, n, settings={**LONGER, "steps": 30}) for n in range(4)]
    file, out = (
        write_jobs(tmp_path, [*jobs, job(tmp_path, 5, image="missing.png")]),
        tmp_path / "out",
    )
    driver = subprocess.Popen(command(file, out, *on(nodes)), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(workers()) == 2, driver)
    time.sleep(1)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=ENOUGH)[1]
    assert driver.returncode == 130 and "To go on, give the same command again." in said
    wait_until(lambda: not workers())
    assert list((out / "work").glob("*/run/*.state.safetensors"))
    assert subprocess.run(command(file, out, *on(nodes))).returncode == 2
    assert subprocess.run(command(file, tmp_path / "plain")).returncode == 2
    assert same_results(tmp_path / "plain", out) == 5
    assert "Could not read" in index_of(out)["job_5"]["error"]


@pytest.mark.slow
def test_a_node_with_another_version_is_refused(nodes: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "em_core", other / "em_core")
    with (other / "em_core" / "prompts.py").open("a") as source:
        source.write("# another version\n")
    node = nodes.add_node(num_cpus=2, num_gpus=2, env_vars={"PYTHONPATH": str(other)})
    try:
        file = write_jobs(tmp_path, [job(tmp_path, 0)])
        more = ["--ray", nodes.address, "--gpus-per-job", "2"]  # only that node has so many
        elsewhere = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ["PYTHONPATH"]}
        ended = subprocess.run(
            command(file, tmp_path / "out", *more),
            cwd=tmp_path, env=elsewhere, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        nodes.remove_node(node, allow_graceful=False)
    assert ended.returncode == 2 and "has another version of Visual Concepts" in ended.stderr
    assert not done_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:1", "No Ray cluster at"), ("nowhere", "Expected auto, local, or the address")],
)
def test_a_cluster_that_cannot_be_reached(address: str, says: str) -> None:
    """At once: Ray itself would try for minutes."""
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        Cluster(address, gpus=0.0)
    assert time.monotonic() - began < 30
