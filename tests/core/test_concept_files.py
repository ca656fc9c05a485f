"""Damaged concept files: none crashes, hangs, or gives other values than were saved."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaged import concept_set, without_checksum
from equality import differences
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from em_core import ConceptSet, UserError
from em_core.files import CHECKSUM, DESCRIPTION, checksum, read_tensors, write_tensors
from em_core.runs.concept_set import KIND, WITHOUT_CHECKSUM, Outline

ROOT = Path(__file__).parents[2]


def read_damaged(folder: Path, count: int, kind: str) -> dict[str, int]:
    """What became of so many mutated files, read in a process of their own that checks no types.

    A crash ends that process, and so do a file that hangs and one that gives other values unsaid.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "damaged.py"), str(folder), str(count), kind],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", ["checksum", "none"])
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    seen = read_damaged(tmp_path, 600, kind)
    assert sum(seen.values()) == 600
    assert sum(n for what, n in seen.items() if "refused" in what) > 400, seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checksum", "none"])
def test_ten_thousand_damaged_files(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if "slow" not in str(request.config.getoption("-m")):
        pytest.skip("run with -m slow")
    seen = read_damaged(tmp_path, 10_000, kind)
    print(kind, seen)  # noqa: T201
    assert sum(seen.values()) == 10_000


def test_every_bit_of_a_file_counts(tmp_path: Path) -> None:
    """Each of them flipped by itself, in a file of some hundred bytes of tensors."""
    small = replace(
        concept_set(), vectors={}, concepts=(), weights={}, masks=(), prompts=(), curves={}
    )
    file = tmp_path / "x.safetensors"
    small.save(file)
    data = file.read_bytes()
    for place in range(8, 8 * len(data)):
        out = bytearray(data)
        out[place // 8] ^= 1 << place % 8
        file.write_bytes(out)
        try:
            assert not differences(ConceptSet.load(file), small), f"bit {place}"
        except UserError:
            continue


def test_a_file_from_before_checksums_is_read_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    concept_set().save(file)
    assert not differences(ConceptSet.load(file), concept_set())
    without_checksum(file)
    with pytest.warns(UserWarning, match="has no checksum, since it was saved by an older version"):
        assert not differences(ConceptSet.load(file), concept_set())


def test_a_file_that_has_lost_its_checksum_is_not_an_old_one(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    concept_set().save(file)
    with safe_open(file, framework="pt") as opened:
        plain = json.loads(opened.metadata()[DESCRIPTION])
    plain.pop(CHECKSUM)
    save_file(load_file(file), file, metadata={DESCRIPTION: json.dumps(plain)})
    with pytest.raises(UserError, match="checksum is not that of its content"):
        ConceptSet.load(file)


def test_equal_concepts_make_equal_files(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        concept_set().save(file)
    assert len({file.read_bytes() for file in files}) == 1


def test_the_checksum_is_of_names_types_shapes_values_and_description() -> None:
    x = torch.arange(6.0)
    given: list[tuple[dict, dict]] = [
        ({"a": x}, {}), ({"b": x}, {}), ({"a": x.int()}, {}), ({"a": x.reshape(2, 3)}, {}), ({}, {}),
        ({"a": x.reshape(3, 2)}, {}), ({"a": x.flip(0)}, {}), ({"a": x, "b": x[:0]}, {}),
        ({"a": x}, {"b": 1}), ({"a": x}, {"b": 2}), ({"a": x}, {"b": 1.0}), ({"a": x}, {"c": 1}),
    ]  # fmt: skip
    assert len({checksum(*one) for one in given}) == len(given)
    one, two = {"a": x, "b": x + 1}, {"b": x + 1, "a": x}
    assert checksum(one, {}) == checksum(two, {})
    assert checksum({}, {}) == hashlib.sha256(b"{}").hexdigest()


def remove(name: str):  # type: ignore[no-untyped-def]
    return lambda tensors, plain: tensors.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, plain: plain.update(lora_scale=float("inf")),
        lambda tensors, plain: plain.update(lora_scale="1"),
        lambda tensors, plain: tensors.update({"masks/0/rex": torch.ones(8, 8)}),
        lambda tensors, plain: tensors.update({"masks/7/rex": torch.ones(8, 8) > 0}),
        lambda tensors, plain: tensors.update({"weights/a": torch.ones(2).int()}),
        lambda tensors, plain: tensors.update({"a": torch.ones(2)}),
        lambda tensors, plain: plain.update(curves={"loss/total": [[1, float("nan")]]}),
        lambda tensors, plain: plain.update(curves=[]),
        lambda tensors, plain: plain.update(settings=[]),
        lambda tensors, plain: plain.update(prompts=[]),
        lambda tensors, plain: plain.update(prompts=[1]),
        lambda tensors, plain: plain.update(concepts=[["rex", ""], ["rex", ""]]),
        lambda tensors, plain: plain.update(concepts=[["rex", 1], ["doll", ""]]),
        lambda tensors, plain: plain.update(concepts=[["../rex", ""], ["doll", ""]]),
        lambda tensors, plain: plain["encoders"].update(clip_l=7),
        lambda tensors, plain: plain.pop("family"),
        remove("vectors/rex/clip_l"),
        remove("model/sample"),
    ],
)
@pytest.mark.parametrize("kind", [KIND, WITHOUT_CHECKSUM])
@pytest.mark.filterwarnings("ignore:.*has no checksum")
def test_values_that_no_run_gives(tmp_path: Path, change, kind: str) -> None:
    """What a file holds is looked at, whatever its checksum says."""
    file = tmp_path / "x.safetensors"
    concept_set().save(file)
    tensors, plain = read_tensors(file, KIND)
    change(tensors, plain)
    write_tensors(file, tensors, kind, plain)
    with pytest.raises(UserError, match="incomplete concept file"):
        ConceptSet.load(file)


@pytest.mark.parametrize("kind", [KIND, WITHOUT_CHECKSUM])
def test_the_outline_is_the_headers(tmp_path: Path, kind: str) -> None:
    """Names and whether there are weights, without the tensors, which may be damaged."""
    file, whole = tmp_path / "x.safetensors", concept_set()
    for concepts in (whole, replace(whole, weights={})):
        tensors, plain = concepts.to_parts()
        write_tensors(file, tensors, kind, plain)
        found = Outline.read(file)
        assert found.names == concepts.names and found.has_weights == bool(concepts.weights)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert Outline.read(file) == found
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        Outline.read(file)
    write_tensors(file, {}, kind, {"concepts": [["rex"]]})
    with pytest.raises(UserError, match="incomplete concept file"):
        Outline.read(file)
    write_tensors(file, {}, "another kind", {})
    with pytest.raises(UserError, match=r"some other safetensors file\. Expected a concepts file"):
        Outline.read(file)


def test_masks_are_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    """Which is not the alphabet's, in which the file has them; and each picture has its own."""
    masks = {name: torch.eye(4, dtype=torch.bool) for name in ("rex", "doll")}
    saved = replace(
        concept_set(),
        prompts=("<rex:dog> and <doll:doll>", "<doll> and <rex>"),
        masks=(masks, {name: masks[name] for name in ("doll", "rex")}),
    )
    saved.save(tmp_path / "both.safetensors")
    loaded = ConceptSet.load(tmp_path / "both.safetensors")
    assert [list(of) for of in loaded.masks] == [["rex", "doll"], ["doll", "rex"]]


def test_kinds_have_one_article(tmp_path: Path) -> None:
    for kind, named in (("concepts", "a concepts"), ("an embedding of SD", "an embedding of SD")):
        with pytest.raises(UserError, match=rf"Expected {named} file"):
            read_tensors(tmp_path / "none.safetensors", kind)
