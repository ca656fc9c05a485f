"""Things found without a word: how many, where, and in which order."""

import pytest
import torch

from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import iou
from em_core.method.discover import asking, nameless
from em_core.prompts import ConceptPrompt
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
