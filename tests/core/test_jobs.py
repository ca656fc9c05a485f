"""Jobs as values: reading them, their keys, and the folder of their results."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from job_files import SHORT, job, write_jobs

from em_core.errors import Notice, UserError, is_disk_full, is_passing
from em_core.jobs.folder import BatchFolder
from em_core.jobs.index import Entry, lines
from em_core.jobs.job import Job, Model
from em_core.jobs.keys import changed, job_key, learning_settings
from em_core.jobs.models import Facts
from em_core.jobs.reading import read_jobs
from em_core.presets import em_settings

FACTS = Facts("digest", "sd-64")


def read(folder: Path, jobs: list[Any], **defaults: Any) -> list[Job]:
    return read_jobs(write_jobs(folder, jobs), defaults)


# Reading


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('{"name": "a", ', "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object"),
        ({"kind": "lern"}, "Bad kind. Expected learn or masks or draw or evaluate, got 'lern'"),
        ({"step": 4}, "Unknown field 'step' of a learn job"),
        ({"name": 4}, "Bad name. Expected a text, got 4"),
        ({"name": "../rex"}, "Bad name '../rex'"),
        ({"name": "con"}, "Windows reserves it"),
        ({"threads": 0}, "Bad threads. Expected a whole number greater than 0"),
        ({"settings": [1]}, "Bad settings. Expected an object"),
        ({"pictures": []}, "Bad pictures. Expected a list"),
        ({"pictures": [{"image": "a.png"}]}, "has both pictures and image"),
        ({"kind": "draw"}, "Unknown field 'image' of a draw job"),
        ({"triggers": "rex: sks"}, "Add \"export\": true"),
        ({"dtype": "float8"}, "Bad dtype"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_job(tmp_path: Path, change: Any, says: str) -> None:
    bad = change if isinstance(change, str) else job(tmp_path, 1, **change)
    with pytest.raises(UserError) as error:
        read(tmp_path, [job(tmp_path, 0), bad, job(tmp_path, 2)])
    assert says in str(error.value) and "nothing was started" in str(error.value)


def test_all_broken_lines_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, ["{", job(tmp_path, 0), "", "3"])
    assert "line 1: " in str(error.value) and "line 4: " in str(error.value)


def test_a_name_is_of_one_job(tmp_path: Path) -> None:
    """The same job twice is no mistake; names that differ in case alone are one on some systems."""
    assert len(read(tmp_path, [job(tmp_path, 0), job(tmp_path, 0)])) == 2
    with pytest.raises(UserError, match=r"'Job_0' is also that of another job, in line 1"):
        read(tmp_path, [job(tmp_path, 0), job(tmp_path, 1, name="Job_0")])


def test_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No job in"):
        read(tmp_path, [])
    with pytest.raises(UserError, match="Could not read"):
        read_jobs(tmp_path / "nowhere.jsonl", {})


def test_what_kinds_need(tmp_path: Path) -> None:
    bare = {"name": "a", "kind": "masks"}
    with pytest.raises(UserError, match="No picture"):
        read(tmp_path, [bare])
    with pytest.raises(UserError, match="needs concepts"):
        read(tmp_path, [{"name": "a", "kind": "draw", "prompts": ["<rex>"]}])
    with pytest.raises(UserError, match="something to measure with"):
        fields = {"concepts": "c.safetensors", "prompts": ["<rex>"]}
        read(tmp_path, [{"name": "a", "kind": "evaluate", **fields}])
    with pytest.raises(UserError, match="takes one picture, got 2"):
        picture = {"image": "a.png", "prompt": "<a:b>"}
        read(tmp_path, [{**bare, "pictures": [picture, picture]}])


def test_defaults_are_for_what_a_job_does_not_say(tmp_path: Path) -> None:
    given = [job(tmp_path, 0, threads=2), job(tmp_path, 1)]
    first, second = read(tmp_path, given, threads=3, model="m", device="cuda:1")
    assert (first.threads, second.threads) == (2, 3)
    assert first.model == Model("m", "cuda:1", "auto") and first.model.device_type == "cuda"


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    """A picture is a job, a folder of pictures is one job of all; what lies beside them belongs to them."""
    job(tmp_path, 0)
    scene, pictures = tmp_path / "scene_0", tmp_path / "pictures"
    (pictures / "both").mkdir(parents=True)
    for name in ("rex", "both/1", "both/2"):
        shutil.copy(scene / "image.png", pictures / f"{name}.png")
    (pictures / "rex.txt").write_text("a photo of <rex:dog>\n")
    (pictures / "both" / "1.txt").write_text("a photo of <doll:doll>")
    shutil.copytree(scene, pictures / "rex.masks")
    (pictures / "left.txt").write_text("no picture")
    with pytest.warns(Notice, match=r"No picture of left\.txt"):
        both, rex = read_jobs(pictures, {"prompt": "<it:thing>", "settings": {"steps": 2}})
    assert [picture.prompt for picture in both.pictures] == ["a photo of <doll:doll>", "<it:thing>"]
    assert (both.name, rex.name, rex.settings) == ("both", "rex", {"steps": 2})
    assert rex.pictures[0].masks == pictures / "rex.masks"
    assert learning_settings(rex, "sd-64")[0].mode == "given"
    with pytest.raises(UserError, match=r"job 1 \(both\): A picture has no prompt"), pytest.warns():
        read_jobs(pictures, {})


# Settings


def test_settings_are_changes_of_the_familys() -> None:
    family = em_settings("sd-64")
    found = changed(family, {"steps": 7, "masks": {"crf": None, "guards": {"min_area": 0.1}}})
    masks = replace(family.masks, crf=None, guards=replace(family.masks.guards, min_area=0.1))
    assert found == replace(family, steps=7, masks=masks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stepps": 4}, r"No setting stepps\. Did you mean steps\? Expected some of mode, steps"),
        ({"masks": {"crff": None}}, r"No setting masks\.crff"),
        ({"steps": 0}, "Bad steps"),
        ({"steps": "many"}, "Bad settings"),
        ({"mode": "em"}, "Mode em does not use masks"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (found,) = read(tmp_path, [job(tmp_path, 0, settings=change, masks="scene_0")])
    with pytest.raises(UserError, match=says):
        learning_settings(found, "sd-64")


# Keys


def test_what_acts_on_a_key(tmp_path: Path) -> None:
    def key(number: int = 0, facts: Facts = FACTS, **change: Any) -> str:
        (found,) = read(tmp_path, [job(tmp_path, number, **change)])
        return job_key(found, facts)

    first = key()
    spaced = job(tmp_path, 0)["prompt"].replace(" ", "  ")
    steps = {**SHORT, "learning_rate": em_settings("sd-64").learning_rate}
    for same in (key(name="other"), key(prompt=spaced), key(settings=steps), key(device="cpu")):
        assert same == first
    others = [
        key(1),
        key(prompt="a photo of <rex:dog>"),
        key(settings={**SHORT, "seed": 1}),
        key(joint={"kind": "lora"}),
        key(threads=2),
        key(device="cuda"),
        key(facts=replace(FACTS, digest="another")),
        key(kind="masks", settings={}),
        key(export=True),
        key(export=True, name="other"),
        key(truth="."),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_a_key_is_of_content_not_of_places_and_times(tmp_path: Path) -> None:
    (before,) = read(tmp_path, [job(tmp_path, 0)])
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "scene_0", elsewhere / "scene_0")
    os.utime(elsewhere / "scene_0" / "image.png", (1, 1))
    (after,) = read(elsewhere, [job(elsewhere, 0)])
    assert job_key(before, FACTS) == job_key(after, FACTS)
    with (elsewhere / "scene_0" / "image.png").open("ab") as file:
        file.write(b"\0")
    assert job_key(before, FACTS) != job_key(after, FACTS)
    (elsewhere / "scene_0" / "image.png").unlink()
    with pytest.raises(UserError, match=r"Could not read .*image\.png: No such file"):
        job_key(after, FACTS)


# Faults


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ConnectionResetError("gone"), True),
        (TimeoutError("late"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError("image file is truncated"), False),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (UserError("Bad steps"), False),
    ],
)
def test_faults_that_pass(error: Exception, passing: bool) -> None:
    wrapped = UserError("Could not write")
    wrapped.__cause__ = error
    assert is_passing(error) is passing and is_passing(wrapped) is passing
    full = "space" in str(error)
    assert is_disk_full(error) is full and is_disk_full(wrapped) is full


# Results


def published(folder: BatchFolder, key: str, text: str = "whole") -> Path:
    made = folder.work(key) / "made"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "a.txt").write_text(text)
    folder.publish(key, made, {"kind": "learn", "seconds": 1.0})
    return folder.result(key)


def test_a_result_is_listed_when_it_is_whole(tmp_path: Path) -> None:
    folder, entry = BatchFolder(tmp_path), Entry("rex", "learn", "k")
    result = published(folder, "k")
    record = folder.finished("k")
    assert record is not None and record["files"] == {"sub/a.txt": 5}
    assert [line["status"] for line in lines(folder, [entry])] == ["done"]
    (result / "sub" / "a.txt").write_text("who")
    assert folder.finished("k") is None
    (result / "sub" / "a.txt").unlink()
    assert folder.finished("k") is None
    assert [line["status"] for line in lines(folder, [entry])] == ["waiting"]
    published(folder, "k")
    assert folder.finished("k") is not None
    (result / "result.json").write_text('{"key": "k", "files"')
    assert folder.finished("k") is None


def test_of_two_results_the_first_stands(tmp_path: Path) -> None:
    """Where a shared folder has no locks, two may do the same job."""
    folder = BatchFolder(tmp_path)
    result = published(folder, "k", "first")
    published(folder, "k", "other")
    assert (result / "sub" / "a.txt").read_text() == "first"
    assert not folder.work("k").exists()


def test_a_job_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path)
    with folder.claimed("k") as mine, folder.claimed("k") as theirs, folder.claimed("l") as other:
        assert (mine, theirs, other) == (True, False, True)
    with folder.claimed("k") as again:
        assert again


def test_clocks_say_nothing(tmp_path: Path) -> None:
    """Files of a machine whose clock is a year ahead, or behind, count as any others."""
    folder = BatchFolder(tmp_path)
    published(folder, "k")
    (tmp_path / "work" / "l").mkdir(parents=True)
    (tmp_path / "work" / "l" / "lock").write_text("")
    for years in (-1, 1):
        for path in tmp_path.rglob("*"):
            then = path.stat().st_mtime + years * 3.15e7
            os.utime(path, (then, then))
        assert folder.finished("k") is not None
        with folder.claimed("l") as mine:
            assert mine


def test_a_failure_is_forgotten_with_success(tmp_path: Path) -> None:
    folder, entry = BatchFolder(tmp_path), Entry("rex", "learn", "k")
    folder.fail("k", {"key": "k", "error": "bad"})
    (line,) = lines(folder, [entry])
    assert (line["status"], line["error"]) == ("failed", "bad")
    published(folder, "k")
    assert folder.failed("k") is None
    assert json.loads((folder.result("k") / "result.json").read_text())["key"] == "k"
