"""Cases in which there is nothing, or too little, to find: said, and never trained under."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.measures import areas, iou
from em_core.method.loop import StepEvent
from em_core.method.m_step import draw
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.method.state import RunState, generator_at
from em_core.prompts import ConceptPrompt
from em_core.runs.runner import run
from em_core.settings import EMSettings
from em_core.show.metrics import metrics
from em_core.show.words import say_losses, say_masks, say_missing

SCENE = concept_scene(160, "A").only  # a star and a circle


def example(text: str, picture: Tensor | None = None) -> Example:
    given = example_of(SCENE)
    return Example(given.picture if picture is None else picture, ConceptPrompt.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "a photo of <a:star> and <b:circle> and <c:heart> and <d:ring> on grass",
        "a photo of <a:star> and <b:star> and <c:star> and <d:star>",
        "a photo of " + " and ".join(f"<c{i}>" for i in range(9)),
    ],
)
def test_more_names_than_things(host: DiffusersHost, short: EMSettings, text: str) -> None:
    """Those without a mask are named, keep their vectors, and stand in no prompt that is trained on."""
    problem = prepare(host, [example(text)], replace(short, steps=4, e_step_every=4))
    start, events = initialise(problem), []
    guards = problem.settings.masks.guards
    found = dict(zip(problem.pictures[0].names, start.pictures[0].found.tolist(), strict=True))
    assert any(found.values()) and not all(found.values())
    covered = areas(start.pictures[0].labels)[start.pictures[0].found]
    assert bool((covered >= guards.min_area).all()) and bool((covered <= guards.max_area).all())
    for seed in range(20):
        drawn = draw(problem, start, torch.Generator().manual_seed(seed))
        assert all(found[name] for subset in drawn.subsets for name in subset)

    def listen(event: StepEvent, state: RunState) -> None:
        events.append(event)

    end = run(problem, start, [listen])
    missing = {name for name, there in found.items() if not there}
    assert set(events[0].missing) == missing
    assert set(metrics(problem, end, 0.0)["missing"]) == set(events[-1].missing)
    for name in missing:
        assert torch.equal(end.vectors[name]["clip_l"], start.vectors[name]["clip_l"])


def test_nothing_found_at_all_is_an_error(host: DiffusersHost, short: EMSettings) -> None:
    picture = 0.5 + 0.1 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    problem = prepare(host, [example("a photo of <ground:grass>", picture)], short)
    with pytest.raises(UserError, match="None of ground was found"):
        initialise(problem)


def test_a_picture_of_one_colour_is_refused(host: DiffusersHost, short: EMSettings) -> None:
    grey = torch.full((3, 64, 64), 0.5)
    with pytest.raises(UserError, match="one colour only"):
        prepare(host, [example("a photo of <a:star>", grey)], short)


def test_a_tiny_picture_is_enlarged_and_learned_from(
    host: DiffusersHost, short: EMSettings
) -> None:
    picture = F.adaptive_avg_pool2d(example_of(SCENE).picture, 8)
    problem = prepare(host, [example("a photo of <a:star>", picture)], replace(short, steps=2))
    assert problem.pictures[0].size == (64, 64)
    run(problem, initialise(problem))
    with pytest.raises(UserError, match="too small"):
        example("a photo of <a:star>", picture[:, :1])


def test_one_name_with_two_meanings_is_an_error(host: DiffusersHost, short: EMSettings) -> None:
    pair = [example("a photo of <a:star>"), example("a photo of <a:circle>")]
    with pytest.raises(UserError, match="starts from 'star' in one prompt and from 'circle'"):
        prepare(host, pair, short)
    with pytest.raises(UserError, match="appears more than once"):
        example("a photo of <a:star> and <a:circle>")


def test_a_picture_without_any_mask_is_left_out(host: DiffusersHost, short: EMSettings) -> None:
    """The other picture is learned from; both are counted in what is said."""
    grass = 0.5 + 0.1 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pair = [example("a photo of <a:star> and <b:circle>"), example("<ground:grass>", grass)]
    problem = prepare(host, pair, short)
    state = initialise(problem)
    generator = generator_at(state.generator)
    assert {draw(problem, state, generator).index for _ in range(20)} == {0}


def test_what_is_said() -> None:
    assert say_missing({}, 1) == ""
    assert say_missing({"rex": (1,)}, 1) == (
        "rex: nothing found; name it by another word, or paint a mask"
    )
    assert say_missing({"rex": (2, 3), "doll": (1,)}, 3).startswith(
        "rex: nothing found in picture 2, 3; name it by another word, or paint a mask. doll: nothing"
    )


def test_things_of_one_word_keep_their_names_in_further_pictures(
    host: DiffusersHost, short: EMSettings
) -> None:
    """The second picture is the first in a mirror: there, what was left stands on the right."""
    one = example_of(concept_scene(161, "E").only)
    two = Example(
        one.picture.flip(-1),
        one.prompt,
        truth={name: mask.flip(-1) for name, mask in one.truth.items()},
    )
    state = initialise(prepare(host, [one, two], short))
    first, second = (picture.labels.float() for picture in state.pictures)
    columns = torch.arange(64.0)
    left, right = ((m.sum(1) * columns).sum(1) / m.sum((1, 2)) for m in (first, second))
    assert left[0] < left[1] and right[0] > right[1]


def test_of_two_things_nearly_above_one_another_the_left_one_comes_first(
    host: DiffusersHost, short: EMSettings
) -> None:
    """Their middles are two of 64 columns apart, half of a cell of the regions that they are found in."""
    scene = concept_scene(52, "E").only
    problem = prepare(host, [example_of(scene)], short)
    masks = initialise(problem).pictures[0].labels
    x = [float(mask.nonzero()[:, 1].float().mean()) for mask in masks]
    assert x[0] < x[1]
    truth = torch.stack([torch.from_numpy(mask) for mask in scene.masks.values()])
    assert bool((iou(masks, truth) > 0.6).all())


def test_a_thing_with_a_core_of_its_own_look_is_found_whole(
    host: DiffusersHost, short: EMSettings
) -> None:
    """A frame with a light middle: the middle is a region of its own, and what the word heats most."""
    scene = concept_scene(0, "B").only
    masks = initialise(prepare(host, [example_of(scene)], short)).pictures[0].labels
    truth = torch.stack([torch.from_numpy(mask) for mask in scene.masks.values()])
    assert bool((iou(masks, truth) > 0.8).all())


def test_what_was_found_in_words() -> None:
    """Shares of the picture; what is under the guards' smallest area was not found."""
    rex, speck = torch.zeros(10, 20, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    rex[:4, :6], speck[0, 0] = True, True
    assert say_masks([{"rex": rex, "doll": speck}]) == "rex 12%, doll nothing found"
    assert say_masks([{"rex": rex}, {"rex": ~rex}]) == "rex 12% and 88%"
    assert say_masks([]) == ""


def test_what_the_losses_say() -> None:
    falling = {"loss/total": tuple((step, 1 / step) for step in range(1, 41))}
    level = {"loss/total": tuple((step, 1.0 + step % 2) for step in range(1, 41))}
    assert say_losses(falling) == "The loss is still falling: more steps may help."
    assert say_losses(level) == "The loss no longer falls measurably."
    assert say_losses(falling | {"joint_loss/total": level["loss/total"]}) == say_losses(level)
    assert say_losses({}) == say_losses({"loss/total": ((1, 0.5),)}) == ""
