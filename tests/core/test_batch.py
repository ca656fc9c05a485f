"""Batches: every job once, equal to the library's own results, whatever goes wrong in between."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from job_files import (
    LONGER,
    contents,
    die_of_three,
    index_of,
    job,
    no_leftovers,
    same_results,
    square,
    write_jobs,
)
from PIL import Image
from tiny_encoders import save_dino

from em_core import ConceptSet, DiffusersHost, Example, find_masks, learn_concepts
from em_core.__main__ import main
from em_core.errors import UserError
from em_core.jobs import kinds, perform
from em_core.jobs.cluster import Cluster
from em_core.jobs.executors import Lost
from em_core.jobs.keys import Task
from em_core.jobs.models import host_of
from em_core.jobs.reading import read_jobs
from em_core.jobs.workers import Workers
from em_core.pictures import read_mask, read_picture, to_image
from em_core.presets import em_settings
from em_core.runs.runner import StopRequest, stop_on_signal

ROOT = Path(__file__).parents[2]


def batch(file: Path, out: Path, *more: str) -> int:
    return main(["batch", str(file), "--out", str(out), "--quiet", *more])


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of four jobs, two of them the same, and the folder in which they were done."""
    folder = tmp_path_factory.mktemp("plain")
    jobs = [job(folder, n, settings=LONGER) for n in range(3)]
    file = write_jobs(folder, [*jobs, {**jobs[0], "name": "again"}])
    assert batch(file, folder / "out") == 0
    return file, folder / "out"


# What comes of jobs


def test_learning_is_the_librarys(plain: tuple[Path, Path], host: DiffusersHost) -> None:
    file, out = plain
    line, scene = index_of(out)["job_1"], file.parent / "scene_1"
    family = em_settings(host.identity().family)
    masks = replace(family.masks, init_timesteps=6)
    settings = replace(family, steps=8, e_step_every=4, masks=masks)
    prompt = (scene / "prompt.txt").read_text().strip()
    example = Example.read(scene / "image.png", prompt)
    truth = {name: read_mask(scene / f"mask_{name}.png") for name in example.prompt.names}
    own = learn_concepts(host, [replace(example, truth=truth)], settings)
    found = ConceptSet.load(out / line["folder"] / "concepts.safetensors")
    assert all(
        torch.equal(v, found.vectors[name][encoder])
        for name, of in own.vectors.items()
        for encoder, v in of.items()
    )
    for name in own.names:
        assert line["iou"][name] == round(own.curves[f"iou/{name}"][-1][1], 4)
        mask = read_mask(out / line["folder"] / f"mask_{name}.png")
        assert torch.equal(mask, own.masks[0][name]) and line["areas"][name] == [
            round(float(mask.float().mean()), 4)
        ]


def test_the_same_job_is_done_once(plain: tuple[Path, Path], capsys: Any) -> None:
    """Twice in a file, and in a second batch; the index has a line for each name."""
    file, out = plain
    index = index_of(out)
    assert index["again"]["folder"] == index["job_0"]["folder"]
    assert len(list((out / "results").iterdir())) == 3
    before = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*")}
    capsys.readouterr()
    assert batch(file, out) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["batch", str(file), "--out", str(out)]) == 0
    assert "0 done, 4 found again" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*")}
    no_leftovers(out)


def test_a_changed_job_is_a_new_one(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """What was learned before stays."""
    jobs = [job(tmp_path, 0, kind="masks", settings={"init_timesteps": 2})]
    assert batch(write_jobs(tmp_path, jobs), tmp_path / "out") == 0
    jobs[0]["seed"] = 1
    assert batch(write_jobs(tmp_path, jobs), tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / "results").iterdir())) == 2


def test_masks_and_pictures_are_the_librarys(
    plain: tuple[Path, Path], host: DiffusersHost, tmp_path: Path
) -> None:
    _, out = plain
    concepts = out / index_of(out)["job_0"]["folder"] / "concepts.safetensors"
    drawn = {"concepts": str(concepts), "prompts": ["a photo of <rex> on sand"], "seed": 5}
    jobs = [
        job(tmp_path, 3, kind="masks", name="found", settings={"init_timesteps": 4}, seed=2),
        {"name": "drawn", "kind": "draw", **drawn, "count": 2, "steps": 3},
    ]
    assert batch(write_jobs(tmp_path, jobs), tmp_path / "out") == 0
    index = index_of(tmp_path / "out")
    scene = tmp_path / "scene_3"
    settings = replace(em_settings(host.identity().family).masks, init_timesteps=4)
    picture, prompt = read_picture(scene / "image.png"), jobs[0]["prompt"]
    own = find_masks(host, picture, prompt, settings=settings, seed=2)
    for name, mask in zip(own.names, own.masks, strict=True):
        found = read_mask(tmp_path / "out" / index["found"]["folder"] / f"mask_{name}.png")
        assert torch.equal(found, mask)
    learned = ConceptSet.load(concepts)
    for seed in (5, 6):
        (own_picture,) = host.generate("a photo of <rex> on sand", learned, [seed], 3)
        with Image.open(
            tmp_path / "out" / index["drawn"]["folder"] / f"prompt_1_seed_{seed}.png"
        ) as image:
            assert image.tobytes() == to_image(own_picture).tobytes()


def test_evaluations_are_the_commands(plain: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = plain
    concepts = out / index_of(out)["job_0"]["folder"] / "concepts.safetensors"
    image, dino = plain[0].parent / "scene_0" / "image.png", save_dino(tmp_path / "dino")
    prompts = ["a photo of <rex> on sand", "<doll>"]
    given = {"concepts": str(concepts), "prompts": prompts, "image": str(image), "dino": str(dino)}
    short = {"count": 2, "steps": 2, "passes": 2, "seed": 3}
    jobs = write_jobs(tmp_path, [{"name": "judged", "kind": "evaluate", **given, **short}])
    assert batch(jobs, tmp_path / "out") == 0
    line = index_of(tmp_path / "out")["judged"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    files = {"concepts": concepts, "image": image, "dino": dino, "out": tmp_path / "own"}
    command = ["evaluate", "--prompts", str(tmp_path / "prompts.txt"), "--quiet"]
    for name, value in {**files, "count": 2, "sampling-steps": 2, "passes": 2, "seed": 3}.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    own = {str(f.relative_to(tmp_path / "own")): f for f in (tmp_path / "own").rglob("*.*")}
    same = [name for name in line["files"] if name in own and name.endswith((".csv", ".png"))]
    assert len([name for name in same if name.endswith(".csv")]) == 3 and len(same) >= 7
    for name in same:
        assert (tmp_path / "out" / line["folder"] / name).read_bytes() == own[name].read_bytes()


def test_exports_are_named_by_the_job(tmp_path: Path) -> None:
    given = job(tmp_path, 0, export=True, name="rex_and_doll", triggers="rex: sks")
    assert batch(write_jobs(tmp_path, [given]), tmp_path / "out") == 0
    files = index_of(tmp_path / "out")["rex_and_doll"]["files"]
    assert "exports/rex_and_doll.safetensors" in files


# Bad jobs among good ones


def test_bad_jobs_are_told_and_the_rest_is_done(tmp_path: Path, capsys: Any) -> None:
    image = tmp_path / "spoiled.png"
    image.write_bytes(b"\x89PNG\r\n")
    jobs = [
        job(tmp_path, 0),
        job(tmp_path, 1, image="missing.png"),
        job(tmp_path, 2, image="spoiled.png"),
        job(tmp_path, 3, settings={"stepps": 3}),
        job(tmp_path, 4, model="nowhere"),
        job(tmp_path, 5, prompt="a photo of a dog"),
        job(tmp_path, 6, joint={"kind": "full"}, dtype="bfloat16"),
        {"name": "drawn", "kind": "draw", "concepts": "none", "prompts": ["<rex>"]},
        job(tmp_path, 7),
    ]
    file, out = write_jobs(tmp_path, jobs), tmp_path / "out"
    assert batch(file, out) == 2
    index = index_of(out)
    says = {
        "job_1": "Could not read", "job_2": "not a readable picture", "job_3": "No setting stepps",
        "job_4": "No model at nowhere", "job_5": "No concept in the prompt", "job_6": "in float32",
        "drawn": "Could not read",
    }  # fmt: skip
    assert {name for name, line in index.items() if line["status"] == "failed"} == says.keys()
    assert index["job_0"]["status"] == index["job_7"]["status"] == "done"
    said = capsys.readouterr()
    assert "2 done, 0 found again, 7 failed" in said.out
    for name, text in says.items():
        assert text in index[name]["error"] and f"{name}: " in said.err
    for fixed in jobs[1:7]:
        fixed.update(job(tmp_path, 0), name=fixed["name"])
        for extra in ("model", "dtype", "joint"):
            fixed.pop(extra, None)
    assert batch(write_jobs(tmp_path, jobs[:7] + jobs[8:]), out) == 0
    assert len(list((out / "results").iterdir())) == 2


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: Any) -> None:
    """Its results would stand under the key of what it was."""
    file = write_jobs(tmp_path, [job(tmp_path, 0)])
    image = tmp_path / "scene_0" / "image.png"

    def changing(*args: Any) -> Any:
        found = host_of(*args)
        image.write_bytes(image.read_bytes() + b"\0")
        return found

    monkeypatch.setattr(perform, "host_of", changing)
    assert batch(file, tmp_path / "out") == 2
    assert "was changed since the batch began" in index_of(tmp_path / "out")["job_0"]["error"]


# Stopping and going on


def stopping_after(steps: int) -> Callable[[], Any]:
    """In place of stop_on_signal: a request that comes when it was looked for so often."""

    class Soon(StopRequest):
        def __call__(self) -> bool:
            self.left = getattr(self, "left", steps) - 1
            self.asked = self.left < 0
            return self.asked

    @contextmanager
    def stop_soon() -> Iterator[StopRequest]:
        yield Soon()

    return stop_soon


def test_a_stopped_batch_goes_on_bit_for_bit(
    plain: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Wherever it stops: the same command again and again ends with what one that was left alone has."""
    file, uninterrupted = plain
    statuses = []
    for looks in (3, 9, 8, 14, 500):
        monkeypatch.setattr("em_core.commands.batch.stop_on_signal", stopping_after(looks))
        statuses.append(batch(file, tmp_path))
        listed = [line for line in index_of(tmp_path).values() if line["status"] == "done"]
        assert all(contents(tmp_path, line) for line in listed)
    assert statuses[0] == 130 and statuses[-1] == 0
    assert same_results(uninterrupted, tmp_path) == 4
    no_leftovers(tmp_path)


def test_a_job_goes_on_from_its_own_state(tmp_path: Path, monkeypatch: Any) -> None:
    """The second time, no step of the first is made again."""
    file, seen = write_jobs(tmp_path, [job(tmp_path, 0, settings=LONGER)]), []
    real = kinds.learn_concepts

    def watched(*args: Any, listeners: Any, **more: Any) -> ConceptSet:
        told = [lambda event, state: seen.append(event.step), *listeners]
        return real(*args, listeners=told, **more)

    monkeypatch.setattr(kinds, "learn_concepts", watched)
    monkeypatch.setattr("em_core.commands.batch.stop_on_signal", stopping_after(8))
    assert batch(file, tmp_path / "out") == 130
    stopped = len(seen)
    assert 0 < stopped < 8
    monkeypatch.setattr("em_core.commands.batch.stop_on_signal", stop_on_signal)
    assert batch(file, tmp_path / "out") == 0
    assert [step for step in seen if step] == list(range(1, 9))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_what_signals_mean_to_a_scheduler(number: int, status: int) -> None:
    with stop_on_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop() and stop.status == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


# Faults that pass


def failing(monkeypatch: Any, error: Exception, times: int) -> list[str]:
    """Let learning fail so often; returns the keys that were tried."""
    tried: list[str] = []
    real = kinds.DO["learn"]

    def learn(work: Any) -> Any:
        tried.append(work.key)
        if len(tried) <= times:
            raise error
        return real(work)

    monkeypatch.setattr(perform, "DO", {**kinds.DO, "learn": learn})
    monkeypatch.setattr("em_core.jobs.batch.WAIT_SECONDS", 0.01)
    return tried


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), ConnectionResetError("gone")]
)
def test_faults_that_pass_are_tried_again(
    tmp_path: Path, monkeypatch: Any, error: Exception
) -> None:
    file = write_jobs(tmp_path, [job(tmp_path, 0)])
    tried = failing(monkeypatch, error, 2)
    assert batch(file, tmp_path / "out") == 0 and len(tried) == 3
    tried = failing(monkeypatch, error, 99)
    assert batch(file, tmp_path / "other", "--retries", "1") == 75 and len(tried) == 2
    line = index_of(tmp_path / "other")["job_0"]
    assert line["status"] == "waiting" and line["error"]


@pytest.mark.parametrize("error", [UserError("Bad picture."), ValueError("a fault of ours")])
def test_nothing_else_is_tried_again(tmp_path: Path, monkeypatch: Any, error: Exception) -> None:
    file = write_jobs(tmp_path, [job(tmp_path, 0), job(tmp_path, 1)])
    tried = failing(monkeypatch, error, 1)
    assert batch(file, tmp_path / "out") == 2 and len(tried) == 2
    index = index_of(tmp_path / "out")
    assert str(error) in index["job_0"]["error"] and index["job_1"]["status"] == "done"


def test_a_full_disk_ends_the_batch(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Not job after job is learned for nothing; what is listed is whole; it goes on when there is room."""
    jobs = [job(tmp_path, n) for n in range(3)]
    file, out = write_jobs(tmp_path, jobs), tmp_path / "out"
    real, full = perform.BatchFolder.publish, []

    def publish(self: Any, *args: Any) -> Any:
        if len(full) == 1:
            monkeypatch.setattr("em_core.files.flush_to_disk", no_space)
        full.append(1)
        return real(self, *args)

    def no_space(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(perform.BatchFolder, "publish", publish)
        patch.setattr(
            "em_core.files.flush_to_disk", __import__("em_core.files").files.flush_to_disk
        )
        assert batch(file, out) == 75
        assert len(full) == 2
    monkeypatch.undo()
    assert "Ended early. Could not write" in capsys.readouterr().err
    assert len(list((out / "results").iterdir())) == 1
    assert batch(file, out) == 0
    assert {line["status"] for line in index_of(out).values()} == {"done"}
    no_leftovers(out)


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: Any) -> None:
    """Learning goes on from its state as memory plans say, to the same result on a CPU."""
    file, steps = write_jobs(tmp_path, [job(tmp_path, 0, settings=LONGER)]), []
    assert batch(file, tmp_path / "whole") == 0
    real = kinds.learn_concepts

    def filling(*args: Any, listeners: Any, **more: Any) -> ConceptSet:
        def watch(event: Any, state: Any) -> None:
            steps.append(event.step)
            if len(steps) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return real(*args, listeners=[watch, *listeners], **more)

    monkeypatch.setattr(kinds, "learn_concepts", filling)
    assert batch(file, tmp_path / "out") == 0
    assert [step for step in steps if step] == list(range(1, 9))
    assert same_results(tmp_path / "whole", tmp_path / "out") == 1
    memory = [index_of(tmp_path / of)["job_0"]["memory"] for of in ("whole", "out")]
    assert memory == ["as asked", "as planned"]


def test_memory_that_does_not_suffice(tmp_path: Path, monkeypatch: Any) -> None:
    file = write_jobs(tmp_path, [job(tmp_path, 0)])
    tried = failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 9)
    assert batch(file, tmp_path / "out") == 2 and len(tried) == 2
    assert "out of memory" in index_of(tmp_path / "out")["job_0"]["error"]


# Workers that are not like the others


def test_another_version_is_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = write_jobs(tmp_path, [job(tmp_path, 0), job(tmp_path, 1)])
    monkeypatch.setattr(perform, "pack_digest", lambda: "b" * 64)
    assert batch(file, tmp_path / "out") == 2
    assert "has another version of Visual Concepts" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results").exists()


def test_another_model_under_the_same_name_is_refused(tmp_path: Path, host: Any) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    given = read_one(tmp_path)
    task = Task(given, "k", tmp_path / "out", perform.pack_digest(), model="another")
    outcome = perform.perform(task, never)
    assert outcome.status == "refused" and "finds another model as demo" in outcome.error


def read_one(folder: Path) -> Any:
    (found,) = read_jobs(write_jobs(folder, [job(folder, 0)]), {})
    return found


def test_a_job_that_someone_else_does_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    """Two batches share a folder; what the other one does is not done again."""
    file, out = write_jobs(tmp_path, [job(tmp_path, 0)]), tmp_path / "out"
    assert batch(file, tmp_path / "first") == 0
    key = index_of(tmp_path / "first")["job_0"]["key"]
    folder = perform.BatchFolder(out)
    monkeypatch.setattr("em_core.jobs.batch.WAIT_SECONDS", 0.05)
    tried = failing(monkeypatch, ValueError("done twice"), 99)
    with folder.claimed(key) as mine:
        assert mine
        finished = threading.Timer(0.5, (tmp_path / "first" / "results").rename, [out / "results"])
        finished.start()
        assert batch(file, out) == 0
    assert not tried


# Parts of a batch, and what cannot be asked for


def test_shards_are_parts_of_a_batch(tmp_path: Path) -> None:
    jobs = [job(tmp_path, n, kind="masks", settings={"init_timesteps": 1}) for n in range(3)]
    file, out = write_jobs(tmp_path, jobs), tmp_path / "out"
    for part in range(2):
        assert batch(file, out, "--shard", f"{part}/2") == 0
    assert len(list((out / "results").iterdir())) == 3
    part_index = (out / "index_0_of_2.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in part_index]
    assert names == ["job_0", "job_2"]
    assert batch(file, out) == 0 and len(index_of(out)) == 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--gpus-per-job", "1"], "Add --ray"),
        (["--defaults", "[1]"], "Could not read --defaults"),
        (["--defaults", '{"nothing": 1}'], "Unknown field 'nothing'"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: Any, more: list[str], says: str) -> None:
    assert batch(write_jobs(tmp_path, [job(tmp_path, 0)]), tmp_path / "out", *more) == 2
    assert says in capsys.readouterr().err


# Processes


def test_workers_give_every_result_once() -> None:
    workers = Workers(2, threads=3)
    try:
        found = dict(workers.map(square, range(12), never))
        again = dict(workers.map(square, range(12, 14), never))
    finally:
        workers.close()
    assert {n: x[0] for n, x in (found | again).items()} == {n: n * n for n in range(14)}
    assert {x[2] for x in found.values()} == {"3"}
    processes = {x[1] for x in found.values()}
    assert len(processes) <= 2 and {x[1] for x in again.values()} <= processes


def test_a_worker_that_dies_loses_its_item_alone() -> None:
    workers = Workers(2)
    try:
        found = dict(workers.map(die_of_three, range(6), never))
    finally:
        workers.close()
    lost = {n for n, result in found.items() if isinstance(result, Lost)}
    assert lost == {3} and found[3].why == "its process ended with exit code 7"
    assert all(found[n] == n for n in found if n != 3)


ORPHAN = """
import sys
from pathlib import Path
from job_files import wait_for_stop
from em_core.jobs.workers import Workers
if __name__ == "__main__":
    list(Workers(1).map(wait_for_stop, [Path(sys.argv[1])], lambda: False))
"""


def test_workers_end_with_who_started_them(tmp_path: Path) -> None:
    """Killed outright; the job is told to stop first."""
    script, file = tmp_path / "orphan.py", tmp_path / "worker"
    script.write_text(ORPHAN)
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, script, file], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        wait_until(lambda: file.exists() and file.read_text().isdecimal())
        worker = int(file.read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists() or gone(worker))
    assert file.read_text() == "stopped"


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def test_ray_is_not_needed_until_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'Install it: pip install "ray>=2\.9"'):
        Cluster("auto", gpus=0.0)


@pytest.mark.slow
def test_workers_do_what_the_loop_does(plain: tuple[Path, Path], tmp_path: Path) -> None:
    file, one_by_one = plain
    assert batch(file, tmp_path, "--workers", "2") == 0
    # The test's own process has its code checked for types, which is another key.
    assert same_results(one_by_one, tmp_path, keys=False) == 4
    no_leftovers(tmp_path)
