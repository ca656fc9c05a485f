"""Things found without a word: how many, where, and in which order."""

from pathlib import Path

import pytest
import torch

from em_core.__main__ import main
from em_core.commands.demo import example_of
from em_core.commands.learn import CONCEPTS
from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import iou
from em_core.method.discover import asking, nameless
from em_core.pictures import read_picture
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet
from em_core.runs.finding import discover, find_masks

# Scenes that no setting was chosen on.
SCENES = (160, 161, 162)


def centroids(masks: torch.Tensor) -> list[float]:
    columns = torch.arange(masks.shape[-1])
    return [float((m.sum(dim=0) * columns).sum() / m.sum()) for m in masks]


def test_prompts_that_ask_and_name() -> None:
    assert str(nameless(2)) == "a photo of <concept1> and <concept2>"
    assert (
        str(asking("thing"))
        == "a photo of a <concept1:thing> and a <concept2:thing> and a <concept3:thing>"
    )
    assert ConceptPrompt.parse(str(nameless(3))) == nameless(3)


def test_two_things_are_found_from_left_to_right(host: DiffusersHost) -> None:
    """Against the true masks of new shapes, named from left to right."""
    right, found_iou = 0, []
    for seed in SCENES:
        example = example_of(concept_scene(seed, "D").only)
        prompt, found = discover(host, example.picture)
        assert found.names == prompt.names and found.masks.shape[0] == len(found.names)
        assert centroids(found.masks) == sorted(centroids(found.masks))
        right += len(found.names) == 2
        if len(found.names) == 2:
            truth = torch.stack(list(example.truth.values()))
            found_iou += iou(found.masks, truth).tolist()
    assert right >= 2
    assert sum(found_iou) / len(found_iou) > 0.75


def test_no_more_than_are_wanted(host: DiffusersHost) -> None:
    example = example_of(concept_scene(SCENES[0], "F").only)
    prompt, found = discover(host, example.picture, most=1)
    assert prompt.names == found.names == ("concept1",)


def test_finding_is_repeatable(host: DiffusersHost) -> None:
    picture = example_of(concept_scene(SCENES[0], "D").only).picture
    one, two = discover(host, picture, seed=3), discover(host, picture, seed=3)
    assert one[0] == two[0] and torch.equal(one[1].masks, two[1].masks)


def test_an_empty_picture_shows_nothing(host: DiffusersHost) -> None:
    with pytest.raises(UserError, match="one colour only"):
        discover(host, torch.full((3, 64, 64), 0.5))


def test_a_mask_that_is_not_there_is_named(host: DiffusersHost) -> None:
    """A map that covers everything is not a mask of something."""
    picture = 0.5 + 0.1 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = find_masks(host, picture, "a photo of <ground:grass>")
    assert found.missing == ("ground",)


def discovering(picture: Path, out: Path, *more: str) -> list[str]:
    command = ["learn", "--mode", "discover", "--image", str(picture), "--out", str(out)]
    return [*command, "--steps", "2", "--quiet", *more]


def test_learning_without_a_prompt(host: DiffusersHost, tmp_path: Path) -> None:
    """`learn --mode discover` learns what `learn` does with the prompt that was found."""
    assert main(["scene", "--seed", "160", "--set", "D", "--out", str(tmp_path)]) == 0
    picture = tmp_path / "image.png"
    prompt, _ = discover(host, read_picture(picture))
    told = discovering(picture, tmp_path / "told", "--prompt", str(prompt))
    assert main(discovering(picture, tmp_path / "found")) == 0
    assert main([*told[:2], "em", *told[3:]]) == 0
    found, named = (ConceptSet.load(tmp_path / to / CONCEPTS) for to in ("found", "told"))
    assert found.names == named.names == prompt.names
    for name in prompt.names:
        assert torch.equal(found.masks[0][name], named.masks[0][name])
        assert all(torch.equal(v, named.vectors[name][k]) for k, v in found.vectors[name].items())


@pytest.mark.parametrize(
    ("mode", "more", "says"),
    [
        ("discover", ["--prompt", "a photo of <a:star>"], "by itself"),
        ("discover", ["--truth", "."], "by itself"),
        ("discover", ["--image", "a.png", "b.png"], "Expected one picture"),
        ("em", [], "No prompt. Expected --prompt"),
    ],
)
def test_what_discovering_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, more: list[str], says: str
) -> None:
    command = discovering(tmp_path / "image.png", tmp_path / "out", "--mode", mode, *more)
    assert main(command) == 2
    assert says in capsys.readouterr().err
