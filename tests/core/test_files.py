"""Files: whole or not at all, and nothing that is not what it claims to be."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from em_core.errors import UserError
from em_core.files import read_tensors, write_aside, write_json, write_tensors

TENSORS = {"a": torch.arange(6).reshape(2, 3), "b/c": torch.tensor(1.5)}


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.safetensors"
    write_tensors(file, TENSORS, "kind 1", {"name": "rex", "n": [1, 2]})
    tensors, plain = read_tensors(file, "kind 1")
    assert plain == {"name": "rex", "n": [1, 2]}
    assert all(torch.equal(tensors[name], x) for name, x in TENSORS.items()) and len(tensors) == 2
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("before")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_aside(file, fail)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


FILLS_UP = """
import pathlib, resource, signal, sys
import torch
from em_core.files import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
write_tensors(pathlib.Path(sys.argv[1]), {"a": torch.zeros(1 << 20)}, "kind 1", {})
"""


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """The system itself cuts the write short, after 64 KiB."""
    pytest.importorskip("resource", reason="this system cannot limit the size of files")
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS, "kind 1", {})
    before = file.read_bytes()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FILLS_UP, str(file)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1 and "UserError: Could not write" in done.stderr, done.stderr
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="Could not write"):
        write_json(tmp_path / "out" / "x.json", {})


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def make_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": 1}))


def make_other_kind(file: Path) -> None:
    write_tensors(file, TENSORS, "kind 2", {})


def make_foreign(file: Path) -> None:
    save_file({"a": torch.zeros(1)}, file)


def make_nan(file: Path) -> None:
    write_tensors(file, {"a": torch.tensor([1.0, float("nan")])}, "kind 1", {})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "not a complete safetensors file"),
        (make_pickle, "not a complete safetensors file"),
        (make_other_kind, "Expected a kind 1 file"),
        (make_foreign, "some other safetensors file"),
        (make_nan, "not finite in a"),
        (Path.unlink, "No file"),
    ],
)
def test_bad_files(tmp_path: Path, spoil, says: str) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, TENSORS, "kind 1", {})
    spoil(file)
    with pytest.raises(UserError, match=says):
        read_tensors(file, "kind 1")


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    """A server or a person of another account reads exports where other files are readable."""
    plain, ours = tmp_path / "plain", tmp_path / "ours.safetensors"
    plain.write_text("")
    write_tensors(ours, {"x": torch.zeros(2)}, "kind", {})
    assert ours.stat().st_mode == plain.stat().st_mode
