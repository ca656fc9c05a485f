"""What is said of wrong input: names as the user knows them, and what was probably meant."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from quick_commands import command, of_picture
from safetensors.torch import load_file

from em_core import ConceptSet, UserError
from em_core.__main__ import main
from em_core.errors import Notice, did_you_mean
from em_core.exchange.importing import trigger_words
from em_core.files import write_tensors
from em_core.jobs.job import read_job
from em_core.jobs.keys import merged
from em_core.prompts import ConceptPrompt, require_known, require_use
from em_core.runs.concept_set import KIND
from em_core.runs.visual_condition import VisualCondition

KNOWN = ("rex", "doll")


def refused(says: str) -> "pytest.RaisesExc[UserError]":
    """The context of an error that says this."""
    return pytest.raises(UserError, match=re.escape(says))


def test_a_name_that_is_almost_right() -> None:
    assert did_you_mean("Rxe", KNOWN) == " Did you mean rex?"
    assert did_you_mean("rex", ("Rex",), "<{}>") == " Did you mean <Rex>?"
    assert did_you_mean("shore", KNOWN) == did_you_mean("x", ()) == ""
    with refused("the word 'circel'. Did you mean 'circle'? It knows: a"):
        require_known("a circel", ("circle", "star", "a"))
    with refused("Unknown field 'promt' of a learn job. Did you mean prompt"):
        read_job({"name": "x", "promt": "a <rex:star>"}, Path())
    with refused("No setting masks.treshold. Did you mean masks.threshold"):
        merged({"masks": {"threshold": 0.4}}, {"masks": {"treshold": 0.5}}, "")


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a photo of rex"], "rex is a plain word there. Write <rex> for what"),
        (["Rex, and a DOLL."], "rex and doll is a plain word there. Write <rex> and <doll> for"),
        (["a star", "a photo of rex's ball"], 'prompt "a photo of rex\'s ball". rex is a plain'),
    ],
)
def test_a_concept_without_its_mark(prompts: list[str], says: str) -> None:
    with refused(says):
        require_use([ConceptPrompt.parse(text) for text in prompts], KNOWN)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a <rex> and doll"], ["doll is a plain word. Write <doll> where"]),
        (["a <rex>", "a rex"], ["In the prompt 'a rex', rex is a plain word. Write <rex>"]),
        (["a star"], ["no concept is marked. Write <rex> and <doll> where"]),
        (["a rexology-rex <rex>", "a <rex> like rex", "<doll> on doll-house"], []),
    ],
)
def test_what_may_be_meant_is_only_said(prompts: list[str], said: list[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        require_use([ConceptPrompt.parse(text) for text in prompts], KNOWN)
    assert len(told) == len(said)
    for one, text in zip(told, said, strict=True):
        assert one.category is Notice and text in str(one.message)


def altered(given: list[str], option: str, *values: str) -> list[str]:
    """The command with another value of an option."""
    at = given.index(option)
    return [*given[: at + 1], *values, *given[at + 2 :]]


@pytest.mark.parametrize(
    ("name", "option", "value", "says"),
    [
        ("generate", "--prompt", "a photo of rex", "Write <rex> for what was learned"),
        ("generate", "--prompt", "a photo of <rez>", "not been learned. Did you mean <rex>? Known"),
        ("learn", "--prompt", "a photo of a star", "--mode given or --truth, is then mask_rex.png"),
        ("dataset", "--prompt", "a photo of a star", "No concept in the prompt"),
        ("refine", "--mask", "nowhere.png", "nowhere.png"),
    ],
)
@pytest.mark.usefixtures("without_model")
def test_wrong_prompts_are_early_errors(
    world: Path, tmp_path: Path, capsys, name: str, option: str, value: str, says: str
) -> None:
    given = altered(command(name, world, tmp_path / "out"), option, value)
    assert main(given) == 2
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("without_model")
def test_learned_concepts_in_the_search_of_masks(world: Path, tmp_path: Path, capsys) -> None:
    given = [*command("masks", world, tmp_path / "out"), "--concepts", str(world / "learned")]
    for prompt, says in (
        ("a photo of rex", "Write <rex> for what was learned"),
        ("a photo of <dol>", "Concept dol has not been learned. Did you mean <doll>?"),
    ):
        assert main(altered(given, "--prompt", prompt)) == 2
        assert says in capsys.readouterr().err


@pytest.mark.usefixtures("without_model")
def test_prompts_without_quotes(world: Path, tmp_path: Path, capsys) -> None:
    given = altered(command("learn", world, tmp_path), "--prompt", "a", "photo", "of", "<rex:star>")
    assert main(given) == 2
    assert "No concept in the prompt 'a'" in capsys.readouterr().err
    given = altered(command("learn", world, tmp_path), "--prompt", "<a:star>", "<b:star>")
    assert main(given) == 2
    assert "Put each prompt in quotes" in capsys.readouterr().err


@pytest.mark.usefixtures("without_model")
def test_masks_that_nothing_would_come_of(world: Path, tmp_path: Path, capsys) -> None:
    given = ["learn", *of_picture(world), "--masks", str(world / "scene"), "--out", str(tmp_path)]
    assert main(given) == 2
    assert "--mode em does not use --masks. Add --mode given" in capsys.readouterr().err


def test_the_folder_of_a_run_stands_for_its_file(world: Path, tmp_path: Path, capsys) -> None:
    """`world/learned` is one, and all commands here are given it; a folder without a file is told."""
    job = {"name": "x", "kind": "draw", "prompts": ["<rex>"]}
    job = read_job(job | {"concepts": "learned"}, world)
    assert job.concepts == world / "learned" / "concepts.safetensors"
    for option in ("--concepts", "--condition"):
        given = ["generate", option, str(tmp_path), "--prompt", "<rex>", "--out", str(tmp_path)]
        with pytest.raises(SystemExit):
            main(given)
        said = capsys.readouterr().err
        assert f"argument {option}: No con" in said and f"in the folder {tmp_path}" in said


def test_kinds_of_files_are_named_as_people_call_them(world: Path, tmp_path: Path) -> None:
    learned = world / "learned" / "concepts.safetensors"
    with refused("is a concepts file of Visual Concepts. Expected a visual condition file"):
        VisualCondition.load(learned)
    with refused("is a lora file of Visual Concepts. Expected a concepts f"):
        ConceptSet.load(world / "exports" / "x_00001.safetensors")
    newer = f"{KIND[:-1]}{int(KIND[-1]) + 1}"
    write_tensors(tmp_path / "new.safetensors", load_file(learned), newer, {})
    with refused("another version of Visual Concepts (format 3, not 2)"):
        ConceptSet.load(tmp_path / "new.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(1)}, "visual-concept", {})
    with refused("is some other safetensors file. Expected a concepts file"):
        ConceptSet.load(tmp_path / "other.safetensors")


OPTIONS = [
    (["learn", "--steps", "0"], "a whole number greater than 0"),
    (["learn", "--vectors", "33"], "a whole number from 1 to 32"),
    (["learn", "--learning-rate", "2"], "a number greater than 0 and at most 1"),
    (["learn", "--learning-rate", "0"], "a number greater than 0 and at most 1"),
    (["learn", "--joint-learning-rate", "nan"], "a number greater than 0 and at most 1"),
    (["learn", "--joint-steps", "0"], "a whole number greater than 0"),
    (["learn", "--visual-steps", "-1"], "a whole number greater than 0"),
    (["learn", "--prior-weight", "-1"], "a number of at least 0"),
    (["learn", "--seed", "-1"], "a whole number from 0 to 9223372036854775807"),
    (["generate", "--strength", "3"], "a number from 0 to 2"),
    (["generate", "--span", "0", "1.5"], "a number from 0 to 1"),
    (["generate", "--guidance", "inf"], "a number of at least 0"),
    (["masks", "--threshold", "1"], "a number between 0 and 1, or otsu"),
    (["refine", "--iterations", "1001"], "a whole number from 0 to 1000"),
    (["refine", "--iterations", "-1"], "a whole number from 0 to 1000"),
    (["refine", "--working-size", "0"], "a whole number greater than 0"),
    (["batch", "--retries", "-1"], "a whole number"),
]


@pytest.mark.parametrize(
    ("given", "says"), OPTIONS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_numbers_are_refused_by_their_options_names(capsys, given: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(given)
    assert done.value.code == 2
    assert f"argument {given[1]}: expected {says}, got '{given[-1]}'" in capsys.readouterr().err


def test_a_lora_tells_its_trigger_words(world: Path, tmp_path: Path, capsys) -> None:
    """Of each concept the one that is named; its token is then the learned one, and no other words do."""
    file = world / "exports" / "x_00001.safetensors"
    assert trigger_words(file, "rex", "") == "sks" and trigger_words(file, "doll", " ") == "ohwx"
    assert trigger_words(file, "max", "SKS dog") == "SKS dog"
    whole = ConceptSet.load(world / "learned" / "concepts.safetensors")
    for name in KNOWN:
        given = ["import", "--file", str(file), "--name", name, "--quiet"]
        assert main([*given, "--out", str(tmp_path / f"{name}.safetensors")]) == 0
        found = ConceptSet.load(tmp_path / f"{name}.safetensors")
        assert found.concepts[0].words == {"rex": "sks", "doll": "ohwx"}[name]
        torch.testing.assert_close(
            found.vectors[name], dict(whole.vectors[name]), atol=1e-3, rtol=0
        )
    for name, words in (("rex", "ohwx"), ("rex", "red star"), ("max", "sksa"), ("doll", "sks")):
        with refused("The file says that they are 'sks' for rex and 'ohwx'"):
            trigger_words(file, name, words)
    with refused("holds several concepts. Its trigger words are 'sks' for"):
        trigger_words(file, "max", "")
