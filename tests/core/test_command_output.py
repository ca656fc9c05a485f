"""What the commands write: nothing is replaced unasked, and each says what it has made, unless it is quiet."""

import argparse
from pathlib import Path

import pytest
import torch
from quick_commands import command

from em_core.__main__ import COMMANDS, main
from em_core.pictures import save_mask

GO_ON = {"batch", "evaluate"}
"""Commands that go on with what their folder holds."""


WRITES = {
    "scene": ["image.png", "mask_doll.png", "prompt.txt"],
    "generate": ["grid.png", "prompt_1_seed_1.png"],
    "masks": ["overlay.png", "heat_doll.png", "mask_rex.png"],
    "discover": ["prompt.txt", "overlay.png", "mask_concept2.png"],
    "refine": ["mask_rex.png"],
    "import": ["rex.safetensors"],
    "learn": ["concepts.safetensors", "mask_doll.png", "curves.png", "metrics.json"],
    "demo": ["concepts.safetensors", "scene/image.png", "generated.png", "mask_rex.png"],
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.usefixtures("without_model")
def test_no_file_is_replaced_unasked(name: str, world: Path, tmp_path: Path, capsys) -> None:
    """Whichever of them is there: the error names it, comes before any work, and nothing is written."""
    for number, file in enumerate(WRITES[name]):
        out = tmp_path / str(number)
        kept = out / file
        kept.parent.mkdir(parents=True)
        kept.write_bytes(b"kept")
        given = ["demo", "--out", str(out)] if name == "demo" else command(name, world, out)
        assert main(given) == 2
        said = capsys.readouterr()
        assert (str(out) if file == "concepts.safetensors" else str(kept)) in said.err
        assert "--overwrite" in said.err and said.out == ""
        assert [path for path in out.rglob("*") if path.is_file()] == [kept]
        assert kept.read_bytes() == b"kept"


@pytest.mark.parametrize("name", ["scene", "generate", "import"])
def test_files_are_replaced_when_asked(name: str, world: Path, tmp_path: Path) -> None:
    kept = tmp_path / WRITES[name][0]
    kept.write_bytes(b"kept")
    given = command(name, world, tmp_path)
    assert main([*given, "--overwrite"]) == 0
    assert kept.read_bytes() != b"kept"
    assert main(given) == 2


def test_a_list_of_files_ends_somewhere(world: Path, tmp_path: Path, capsys) -> None:
    for seed in range(20):
        (tmp_path / f"prompt_1_seed_{seed}.png").touch()
    given = command("generate", world, tmp_path)
    assert main([*given, "--count", "20"]) == 2
    said = capsys.readouterr().err
    assert said.count("prompt_1") == 6 and "and 14 more are there already" in said


@pytest.mark.parametrize("name", ["scene", "generate", "masks", "discover", "refine", "learn"])
def test_each_says_what_it_wrote_unless_it_is_quiet(
    name: str, world: Path, tmp_path: Path, capsys
) -> None:
    """Every file, and areas where there are masks; quiet, there is not a word, not even of the memory plan."""
    assert main(command(name, world, tmp_path / "told")) == 0
    said = capsys.readouterr().out
    files = {file.name for file in (tmp_path / "told").iterdir()}
    line = said.splitlines()[-1]
    assert line.startswith(f"Written to {tmp_path / 'told'}: ")
    listed = line.partition(": ")[2].removesuffix(".")
    assert set(listed.split(", ")) == files
    if name in ("masks", "refine", "learn"):
        assert "Masks: rex " in said and "%" in said
    if name == "discover":
        assert "2 found, from left to right: concept1 " in said and "%" in said
    assert ("IoU with the true masks: rex 0." in said) == (name == "learn")
    assert main([*command(name, world, tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert {file.name for file in (tmp_path / "quiet").iterdir()} == files


@pytest.mark.parametrize("name", ["import", "export", "dataset"])
def test_files_for_others_are_named_unless_it_is_quiet(
    name: str, world: Path, tmp_path: Path, capsys
) -> None:
    assert main(command(name, world, tmp_path / "told")) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "told") in said
    if name != "dataset":
        assert all(file.name in said for file in (tmp_path / "told").iterdir())
    assert main([*command(name, world, tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_is_wrong_is_said_also_when_quiet(world: Path, tmp_path: Path, capsys) -> None:
    given = command("masks", world, tmp_path)
    save_mask(tmp_path / "white.png", torch.ones(64, 64, dtype=torch.bool))
    given[given.index("--image") + 1] = str(tmp_path / "white.png")
    status = main([*given, "--quiet"])
    said = capsys.readouterr().err
    assert "one colour only" in said if status else "nothing found" in said


def parsers() -> dict[str, argparse.ArgumentParser]:
    subparsers = argparse.ArgumentParser().add_subparsers()
    for one in COMMANDS:
        one.add_parser(subparsers)
    return dict(subparsers.choices)


@pytest.mark.parametrize("name", parsers())
def test_the_rule_holds_for_every_command(name: str) -> None:
    """Each that writes can be told to replace and to be quiet."""
    options = parsers()[name]._option_string_actions
    assert "--out" in options and "--quiet" in options
    assert ("--overwrite" in options) == (name not in GO_ON)


def test_the_rule_is_in_the_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "No command replaces a file unasked" in said and "--overwrite" in said


def test_import_says_that_a_folder_is_no_file(world: Path, tmp_path: Path, capsys) -> None:
    given = command("import", world, tmp_path)
    given[-1] = str(tmp_path)
    assert main(given) == 2
    assert f"{tmp_path} is a folder. Expected the file to write" in capsys.readouterr().err
