"""The store is a cache: bounded, shared by processes, and never the reason that a result is lost."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import concept_set
from equality import differences
from safetensors import safe_open
from safetensors.torch import save_file
from whole_runs import JOINT
from windows import LINUX, in_use, windows_locks

from em_core import (
    ConceptSet,
    DiffusersHost,
    EMSettings,
    Example,
    RunStore,
    UserError,
    learn_concepts,
)
from em_core.errors import StoreWarning
from em_core.files import read_tensors, write_tensors
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.model.identity import ModelIdentity
from em_core.runs.runner import run
from em_core.runs.state_file import StateFile

ROOT = Path(__file__).parents[2]


class Broken(Exception):
    """What goes wrong on purpose."""


def broken(*_: object, **__: object) -> None:
    raise Broken


@pytest.fixture
def brief(short: EMSettings) -> EMSettings:
    masks = replace(short.masks, init_timesteps=6)
    return replace(short, steps=4, e_step_every=2, masks=masks)


# Bounds


def a_concept_set() -> ConceptSet:
    identity = ModelIdentity("sd1", "abc", {"clip_l": 4}, torch.arange(8.0))
    return ConceptSet((), {}, identity)


def filled(folder: Path, count: int) -> RunStore:
    """A store of finished runs 0, 1, ..., used in that order."""
    store = RunStore(folder)
    for i in range(count):
        store.keep(str(i), a_concept_set())
        os.utime(store.result_file(str(i)), (1000 + i, 1000 + i))
    return store


def keys_in(folder: Path) -> list[str]:
    return sorted(f.name.partition(".")[0] for f in folder.iterdir())


def test_the_longest_unused_runs_go_first(tmp_path: Path, monkeypatch) -> None:
    """Being found again is a use."""
    store = filled(tmp_path, 4)
    monkeypatch.setattr("em_core.runs.store.MOST_FILES", 3)
    assert store.finished("0") is not None
    store.keep("new", a_concept_set())
    assert keys_in(tmp_path) == ["0", "3", "new"]


def test_a_store_keeps_to_its_bytes(tmp_path: Path, monkeypatch) -> None:
    """As many files as fit; the one that was just written stays even where it alone is too large."""
    store = filled(tmp_path, 5)
    size = store.result_file("0").stat().st_size
    monkeypatch.setattr("em_core.runs.store.MOST_BYTES", 3 * size + 1)
    store.prune(keep=store.result_file("0"))
    assert keys_in(tmp_path) == ["0", "3", "4"]
    monkeypatch.setattr("em_core.runs.store.MOST_BYTES", size - 1)
    store.prune(keep=store.result_file("3"))
    assert keys_in(tmp_path) == ["3"]


def test_a_stopped_run_does_not_leave_the_store_too_full(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    store = filled(tmp_path, 4)
    monkeypatch.setattr("em_core.runs.store.MOST_FILES", 2)
    with pytest.raises(Broken):
        learn_concepts(host, [example], brief, store=store, key="stopped", listeners=[broken])
    assert keys_in(tmp_path) == ["3", "stopped"]


def test_bounds_hold_where_a_file_cannot_be_deleted(tmp_path: Path, monkeypatch) -> None:
    """Another process reads the oldest one, on Windows; the next oldest goes instead."""
    store, unlink = filled(tmp_path, 5), os.unlink

    def locked(path: Any, **more: Any) -> None:
        if str(path).endswith("0.concepts.safetensors"):
            raise PermissionError(13, "The process cannot access the file")
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", locked)
    monkeypatch.setattr("em_core.runs.store.MOST_FILES", 3)
    store.prune(keep=store.result_file("4"))
    assert keys_in(tmp_path) == ["0", "3", "4"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """A file that was abandoned a day ago is not; without that, they would fill the disk."""
    store = filled(tmp_path, 2)
    fresh, old = (tmp_path / f".{n}.concepts.safetensors.1f2e.safetensors" for n in ("a", "b"))
    for file in (fresh, old):
        file.write_bytes(b"half")
    day = old.stat().st_mtime - 25 * 3600
    os.utime(old, (day, day))
    monkeypatch.setattr("em_core.runs.store.MOST_FILES", 1)
    store.prune(keep=store.result_file("1"))
    assert {f.name for f in tmp_path.iterdir()} == {fresh.name, "1.concepts.safetensors"}


def test_what_is_kept_is_found_as_it_was(tmp_path: Path) -> None:
    """Its IoU curves too, where no other true masks are given to compare with."""
    store, whole = RunStore(tmp_path), concept_set()
    whole = replace(whole, curves={**whole.curves, "iou/rex": ((2, 0.5),)})
    store.keep("key", whole)
    assert not differences(store.finished("key"), whole)
    assert store.finished("other") is None


# Full and read-only disks


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_full_disk_loses_no_concepts(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch, kind: str
) -> None:
    """Neither at the end nor at the saves before it; what fails is told once each."""
    joint = replace(JOINT, kind=kind, steps=2)
    whole = learn_concepts(host, [example], brief, joint)
    monkeypatch.setattr("em_core.runs.runner.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("em_core.files.save_file", no_space)
    with pytest.warns(StoreWarning) as told:
        found = learn_concepts(host, [example], brief, joint, store=RunStore(tmp_path / "new"))
    assert not differences(found, whole)
    assert not list((tmp_path / "new").iterdir())
    said = [str(warning.message) for warning in told]
    assert len(said) == 2 and all("No space left on device" in text for text in said)
    assert "state of the run was not saved" in said[0] and "not remembered" in said[1]


def test_a_store_that_is_no_folder(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("")
    with pytest.warns(StoreWarning, match="not remembered"):
        found = learn_concepts(host, [example], brief, store=RunStore(tmp_path / "store"))
    assert not differences(found, learn_concepts(host, [example], brief))


def test_a_store_on_a_disk_that_has_become_read_only(tmp_path: Path, monkeypatch) -> None:
    """What is in it is found; a damaged file counts as none though it cannot be deleted."""
    store = filled(tmp_path, 2)
    store.result_file("1").write_bytes(b"damaged")
    for name in ("utime", "unlink", "replace", "mkdir"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr("em_core.files.save_file", read_only)
    monkeypatch.setattr("em_core.runs.store.MOST_FILES", 1)
    found = store.finished("0")
    assert found is not None and not differences(found, a_concept_set())
    assert store.finished("1") is None
    with pytest.warns(StoreWarning, match="Read-only file system"):
        store.keep("2", a_concept_set())
    assert keys_in(tmp_path) == ["0", "1"]


def test_saving_works_again_once_there_is_space(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    """Each time that it fails anew is told; the run is the same, and its last state is on disk."""
    problem = prepare(host, [example], replace(brief, steps=8))
    start, file = initialise(problem), StateFile(tmp_path / "s.safetensors", "key")
    whole = run(problem, start, stop=iter([False] * 6 + [True]).__next__)
    monkeypatch.setattr("em_core.runs.runner.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("em_core.runs.runner.SAVE_SHARE", 0)
    works = iter([True, False, False, True, False, True, True, True])

    def save(*args: Any, **more: Any) -> None:
        (save_file if next(works) else no_space)(*args, **more)

    monkeypatch.setattr("em_core.files.save_file", save)
    with pytest.warns(StoreWarning) as told:
        state = run(problem, start, file=file, stop=iter([False] * 6 + [True]).__next__)
    assert len(told) == 2
    assert not differences(state, whole)
    assert file.holds(state) and not differences(file.load(host.device), state)
    assert not file.holds(replace(state, step=state.step + 1))


def test_what_ended_a_run_is_told_though_its_state_cannot_be_saved(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    problem = prepare(host, [example], brief)
    file, start = StateFile(tmp_path / "s.safetensors", "key"), initialise(problem)
    monkeypatch.setattr("em_core.files.save_file", no_space)
    with pytest.raises(Broken), pytest.warns(StoreWarning, match="No space left"):
        run(problem, start, [broken], file)
    assert not file.exists() and not file.holds(start)


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch) -> None:
    """After a power failure there is the old file or the new one: flush, rename, flush the folder."""
    done: list[tuple[str, str]] = []
    fsync, move = os.fsync, os.replace

    def flush(handle: int) -> None:
        done.append(("fsync", os.path.realpath(f"/proc/self/fd/{handle}") if LINUX else ""))
        fsync(handle)

    def rename(source: Path, target: Path) -> None:
        done.append(("rename", str(target)))
        assert not LINUX or done[0] == ("fsync", str(source.resolve()))
        move(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.zeros(2)}, "kind 1", {})
    assert [what for what, _ in done] == ["fsync", "rename", "fsync"]
    assert not LINUX or done[2][1] == str(tmp_path.resolve())


@pytest.mark.parametrize(
    ("number", "fails"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)]
)
def test_a_flush_that_fails(tmp_path: Path, monkeypatch, number: int, fails: bool) -> None:
    """A disk that reports an error late keeps the old file; a file system without flush is no error."""
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"a": torch.zeros(2)}, "kind 1", {})
    before = file.read_bytes()

    def flush(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", flush)
    if fails:
        with pytest.raises(UserError, match="Could not write"):
            write_tensors(file, {"a": torch.ones(2)}, "kind 1", {})
    else:
        write_tensors(file, {"a": torch.ones(2)}, "kind 1", {})
    assert (file.read_bytes() == before) == fails and list(tmp_path.iterdir()) == [file]


# Files in use


@pytest.mark.skipif(not LINUX, reason="the locks are made from /proc")
def test_no_file_is_in_use_after_reading(tmp_path: Path, monkeypatch) -> None:
    """Written again, pruned and deleted while what was read from it is alive, as on Windows."""
    store = filled(tmp_path, 3)
    state = tmp_path / "s.safetensors"
    write_tensors(state, {"a": torch.ones(5000)}, "kind 1", {})
    with windows_locks(monkeypatch):
        held, read = store.finished("0"), read_tensors(state, "kind 1")
        assert held is not None and not in_use(store.result_file("0")) and not in_use(state)
        store.keep("0", held)
        write_tensors(state, {"a": torch.zeros(5000)}, "kind 1", {})
        assert bool(read[0]["a"].all()) and not differences(held, a_concept_set())
        kept = [store.finished(str(i)) for i in range(3)]
        monkeypatch.setattr("em_core.runs.store.MOST_FILES", 1)
        store.prune(keep=store.result_file("2"))
        assert keys_in(tmp_path) == ["2"] and all(kept)
        state.unlink(missing_ok=True)


@pytest.mark.skipif(not LINUX, reason="the locks are made from /proc")
def test_the_locks_hold_what_windows_would(tmp_path: Path, monkeypatch) -> None:
    """A tensor of safetensors keeps its file mapped; an open file is held as well."""
    file, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.zeros(5000)}, file)
    save_file({"a": torch.zeros(5000)}, other)
    with safe_open(file, framework="pt") as opened:
        mapped = opened.get_tensor("a")
    with windows_locks(monkeypatch):
        with pytest.raises(PermissionError):
            os.replace(other, file)
        with pytest.raises(PermissionError):
            file.unlink()
        with other.open("rb"), pytest.raises(PermissionError):
            other.unlink()
        assert mapped is not None
        del mapped
        file.unlink()
        other.unlink()


def test_a_file_that_is_in_use_for_a_moment(tmp_path: Path, monkeypatch) -> None:
    """A virus scanner looks at it, say: writing waits, but not for long."""
    file, move, tries = tmp_path / "x.safetensors", os.replace, iter([False, False, True])
    monkeypatch.setattr("em_core.files.REPLACE_SECONDS", 0.0)

    def busy(free: Callable[[], bool]) -> Callable[[Path, Path], None]:
        def rename(source: Path, target: Path) -> None:
            if not free():
                raise PermissionError(13, "The process cannot access the file")
            move(source, target)

        return rename

    monkeypatch.setattr(os, "replace", busy(lambda: next(tries)))
    write_tensors(file, {"a": torch.zeros(2)}, "kind 1", {})
    monkeypatch.setattr(os, "replace", busy(lambda: False))
    with pytest.raises(UserError, match="cannot access the file"):
        write_tensors(file, {"a": torch.ones(2)}, "kind 1", {})
    assert not read_tensors(file, "kind 1")[0]["a"].any() and list(tmp_path.iterdir()) == [file]


# Two processes


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    """safetensors opens it by its name twice: the header of one file, the tensors of the other."""
    file, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    for path, value in ((file, 1.0), (other, 2.0)):
        write_tensors(path, {"a": torch.full((50,), value)}, "kind 1", {"value": value})
    opened = []

    class Slow:
        """Opens the file just before another process replaces it."""

        def __init__(self, path: Path, **options: Any) -> None:
            self.file = safe_open(path, **options)
            opened.append(path)
            if len(opened) == 1:
                os.replace(other, file)

        def __enter__(self) -> Any:
            return self.file.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

    monkeypatch.setattr("em_core.files.safe_open", Slow)
    tensors, plain = read_tensors(file, "kind 1")
    assert len(opened) == 2 and plain["value"] == 2.0 and set(tensors["a"].tolist()) == {2.0}


AT_WORK = """
import random, sys, warnings
import torch
import em_core.runs.store as store
from em_core.files import read_tensors
from em_core.errors import UserError
from em_core.method.state import RunState
from em_core.model.identity import ModelIdentity
from em_core.runs.concept_set import ConceptSet
warnings.simplefilter("error")
store.MOST_FILES = 3
folder, me = sys.argv[1:]
random.seed(me)
kept, cpu = store.RunStore(folder), torch.device("cpu")
for turn in range(120):
    key = str(random.randrange(5))
    value = float(10 * int(key) + 1)
    identity = ModelIdentity("sd1", "abc", {}, torch.full((20000,), value))
    kept.keep(key, ConceptSet((), {}, identity))
    found = kept.finished(str(random.randrange(5)))
    assert found is None or bool((found.identity.sample == found.identity.sample[0]).all())
    file = kept.state(key)
    file.save(RunState({}, torch.full((5000,), int(key), dtype=torch.uint8), ()))
    try:
        assert set(file.load(cpu).generator.tolist()) == {int(key)}
    except UserError as error:
        assert "No file" in str(error), error
    file.remove()
"""


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    """They write, read, delete and prune the same few runs; each file is whole, and none is left over."""
    folder = tmp_path / "store"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AT_WORK, str(folder), str(me)],
            env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for me in range(2)
    ]  # fmt: skip
    for process in both:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    left = sorted(f.name for f in folder.iterdir())
    assert left and all(name[0].isdecimal() and name.count(".") == 2 for name in left), left
    assert all(ConceptSet.load(file) for file in folder.iterdir())
