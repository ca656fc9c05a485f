"""Names, numbers and trigger words of exported files; what goes wrong is said, and nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from em_core import ConceptSet, UserError
from em_core.demo import model_path
from em_core.errors import Notice
from em_core.exchange import saving
from em_core.exchange.describing import described_triggers
from em_core.exchange.saving import exports_of, numbered, save_exports
from em_core.exchange.triggers import RARE, Vocabulary, read_triggers
from em_core.hosts.diffusers import DiffusersHost
from em_core.model.identity import ModelIdentity
from em_core.prompts import Concept


@pytest.fixture(scope="module")
def words() -> dict[str, Vocabulary]:
    """The demo model's vocabulary, of which 16 rare words are pieces."""
    return DiffusersHost.load(model_path()).vocabularies()


def concepts(**counts: int) -> ConceptSet:
    """Concepts with so many vectors each."""
    identity = ModelIdentity("sd-64", "x", {"clip_l": 64}, torch.zeros(1))
    vectors = {name: {"clip_l": torch.ones(n, 64)} for name, n in counts.items()}
    return ConceptSet(tuple(map(Concept, counts)), vectors, identity)


def test_triggers_are_chosen_in_order_and_apart(words: dict[str, Vocabulary]) -> None:
    found = exports_of(concepts(rex=1, doll=3), "x", words).triggers
    assert found == {"rex": RARE[:1], "doll": RARE[1:4]}
    found = exports_of(concepts(rex=1, doll=2), "x", words, "doll: sks ohwx").triggers
    assert found == {"rex": RARE[2:3], "doll": ("sks", "ohwx")}


def test_a_concept_keeps_its_words_and_no_other_gets_them(
    tmp_path: Path, words: dict[str, Vocabulary]
) -> None:
    """Files of one folder can be loaded together, and a concept that is saved anew replaces its former self."""

    def save(name: str, **counts: int) -> dict[str, tuple[str, ...]]:
        return dict(save_exports(concepts(**counts), name, tmp_path, tmp_path, words).triggers)

    assert save("one", rex=1) == {"rex": ("sks",)}
    assert save("two", max=2) == {"max": ("ohwx", "hns")}
    assert save("three", max=1, rex=1) == {"max": ("ohwx",), "rex": ("sks",)}
    assert save("one", other=1) == {"other": (RARE[3],)}  # its former file, with sks, is replaced
    assert described_triggers(tmp_path / "two.safetensors") == {"max": ["ohwx", "hns"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rex: dragon", r"'dragon' cannot stand .* got \d pieces"),
        ("rex: 7", "lower-case letters"),
        ("rex: sks ohwx", "Bad number of trigger words for rex. Expected 1"),
        ("rex: sks, doll: sks ohwx", "sks is given twice"),
        ("doll: sks sks", "sks is given twice"),
        ("max: sks", "Bad trigger words 'max: sks'. Expected the name of a concept"),
        ("rex:", "Bad trigger words"),
        ("sks", "Bad trigger words"),
        ("rex: sks, rex: ohwx", "once"),
    ],
)
def test_triggers_that_cannot_be_used(
    words: dict[str, Vocabulary], text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        exports_of(concepts(rex=1, doll=2), "x", words, text)


def test_of_a_single_concept_words_are_enough() -> None:
    assert read_triggers("SKS ohwx", ["rex"]) == {"rex": ("sks", "ohwx")}
    assert read_triggers("", ["rex"]) == {}


def test_words_in_use_are_said(tmp_path: Path, words: dict[str, Vocabulary]) -> None:
    save_exports(concepts(rex=1), "one", tmp_path, tmp_path, words)
    with pytest.warns(Notice, match="sks means rex in another file"):
        save_exports(concepts(max=1), "two", tmp_path, tmp_path, words, "sks")
    with pytest.warns(Notice, match="star is a common one"):
        save_exports(concepts(max=1), "three", tmp_path, tmp_path, words, "star")


def test_no_words_are_left(words: dict[str, Vocabulary]) -> None:
    taken = dict.fromkeys(RARE, "someone")
    with pytest.raises(UserError, match="No rare words are left for 1 vectors"):
        exports_of(concepts(rex=1), "x", words, taken=taken)


def test_files_of_others_are_passed_over(tmp_path: Path, words: dict[str, Vocabulary]) -> None:
    """Among them one that only looks like ours, one that is cut, and one without an end to its header."""
    save_exports(concepts(rex=1), "one", tmp_path, tmp_path, words)
    whole = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:200])
    (tmp_path / "huge.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + whole[8:300])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "like.safetensors",
              metadata={"visual_concepts": '{"kind": "visual-concepts lora 1", "triggers": [1]}'})  # fmt: skip
    found = saving.triggers_in_use(sorted(tmp_path.glob("*.safetensors")))
    assert found == {"sks": "rex"}


def test_numbers_go_on_from_the_highest_in_any_folder(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "missing"]
    assert numbered("rex", folders) == "rex_00001"
    for folder, name in (
        (0, "rex_00002"),
        (1, "REX_00011_doll_sd1"),
        (1, "rexy_00020"),
        (0, "rex_3"),
    ):
        folders[folder].mkdir(exist_ok=True)
        (folders[folder] / f"{name}.safetensors").touch()
    assert numbered("rex", folders) == "rex_00012"


def test_all_files_or_none(
    tmp_path: Path, words: dict[str, Vocabulary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full at the last of them leaves what was there, and nothing new."""
    before = concepts(rex=1, doll=1)
    save_exports(before, "x", tmp_path, tmp_path, words)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written: list[Path] = []
    write: Callable = saving.write_export

    def full(export: saving.Export, path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        write(export, path)

    monkeypatch.setattr(saving, "write_export", full)
    with pytest.raises(
        UserError, match=r"Could not write .*x_doll_sd-64\.safetensors.* No space left"
    ):
        save_exports(concepts(rex=2, doll=2), "x", tmp_path, tmp_path, words)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


def test_equal_concepts_make_equal_tensors(tmp_path: Path, words: dict[str, Vocabulary]) -> None:
    files = []
    for folder in ("a", "b"):
        save_exports(concepts(rex=2), "x", tmp_path / folder, tmp_path / folder, words)
        files.append(load_file(tmp_path / folder / "x.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][n], files[1][n]) for n in files[0])
