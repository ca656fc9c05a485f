"""Which of a prompt's concepts a picture does not show: by the error of the noise."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from toy_host import CHANNELS, ToyHost

from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.guards import Guards
from em_core.masks.measures import iou
from em_core.masks.settings import MaskSettings
from em_core.method.loop import learn
from em_core.method.presence import missed_regions, naming, presence, unseen, who_is_there
from em_core.method.problem import Prepared, prepare, prepare_picture
from em_core.method.start import initialise, only_alike
from em_core.model.protocol import Conditioning
from em_core.presets import em_settings
from em_core.prompts import ConceptPrompt, ConceptVectors
from em_core.runs.finding import find_masks
from em_core.settings import EMSettings
from em_core.show.words import say_missing

OFFSETS = {"red": 0.1, "blue": 0.6, "grey": 0.4}


class WrongBy(ToyHost):
    """A host whose every output is off its target by the sum of its concepts' offsets."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.passes_at_once = together
        self.Z0 = torch.empty(0)

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {"colours": torch.full((count or 1, CHANNELS), OFFSETS[words])}

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        total = sum(float(by_encoder["colours"][0, 0]) for by_encoder in vectors.values())
        offset = torch.full((len(prompts), 1), total)
        return replace(super().encode_prompts(prompts, vectors), inputs={"offset": offset})

    def predict(self, Z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        s = t[:, None, None, None]
        eps = (Z_t - (1 - s) * self.Z0) / s
        return eps - self.Z0 + conditioning.inputs["offset"][:, :, None, None]


def looked_at(
    host: WrongBy, text: str
) -> tuple[Prepared, dict[str, dict[str, Tensor]], torch.Generator]:
    """A random picture with a prompt, as the host sees it, and the vectors of the prompt's words."""
    prompt = ConceptPrompt.parse(text)
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    prepared = prepare_picture(host, Example(picture, prompt), MaskSettings())
    host.Z0, generator = prepared.Z0, torch.Generator().manual_seed(1)
    vectors = {c.name: host.initial_vectors(c.words, 1, generator) for c in prompt.concepts}
    return prepared, vectors, generator


@pytest.mark.parametrize("together", [1, 4, 10])
def test_presence_is_the_difference_of_the_errors(together: int) -> None:
    host = WrongBy(together)
    prepared, vectors, generator = looked_at(host, "a photo of <dog:red> and <cat:blue>")
    found = presence(host, prepared, vectors, "grey", 7, generator)
    dog, cat, thing = OFFSETS["red"], OFFSETS["blue"], OFFSETS["grey"]
    expected = [(thing + cat) ** 2 - (dog + cat) ** 2, (dog + thing) ** 2 - (dog + cat) ** 2]
    torch.testing.assert_close(found, torch.tensor([expected] * 7), rtol=1e-3, atol=1e-3)


class WrongBySide(WrongBy):
    """Off its target by one in the side of the picture whose word the prompt does not have."""

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        words = {float(by_encoder["colours"][0, 0]) for by_encoder in vectors.values()}
        wrong = [float(not any(abs(w - OFFSETS[c]) < 1e-6 for w in words)) for c in ("red", "blue")]
        conditioning = super().encode_prompts(prompts, vectors)
        return replace(conditioning, inputs={"wrong": torch.tensor([wrong] * len(prompts))})

    def predict(self, Z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        s, wrong = t[:, None, None, None], conditioning.inputs["wrong"]
        halves = wrong.repeat_interleave(Z_t.shape[-1] // 2, dim=1)[:, None, None, :]
        return (Z_t - (1 - s) * self.Z0) / s - self.Z0 + halves


@pytest.mark.parametrize("together", [1, 4, 10])
def test_the_error_names_the_side_of_each_word(together: int) -> None:
    """<cat:blue> is right, <dog:red> left, and the generic word, which helps nowhere, in none."""
    host = WrongBySide(together)
    prepared, vectors, generator = looked_at(host, "a photo of <cat:blue>, <dog:red> and <it:grey>")
    members = torch.zeros(2, 4, 4)
    members[0, :, :2], members[1, :, 2:] = 1, 1
    asked = partial(missed_regions, host, prepared, vectors, "grey", MaskSettings(), members)
    told = naming(asked((), generator))
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(told, expected, atol=1e-3, rtol=0)
    alike = naming(asked([(0, 1)], generator))
    torch.testing.assert_close(
        alike, torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), atol=1e-3, rtol=0
    )


def test_concepts_of_one_word_are_asked_for_together() -> None:
    """Either <red> keeps the model right; that they are left shows only without both."""
    host = WrongBySide(4)
    prepared, vectors, generator = looked_at(host, "a photo of <a:red>, <b:red> and <it:grey>")
    members = torch.zeros(2, 4, 4)
    members[0, :, :2], members[1, :, 2:] = 1, 1
    told = naming(
        missed_regions(
            host, prepared, vectors, "grey", MaskSettings(), members, [(0, 1)], generator
        )
    )
    expected = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(told, expected, atol=1e-3, rtol=0)


def test_unseen_is_what_no_large_region_is_better_for() -> None:
    """Means by hand; the third region is a speck, and the last concept's vectors are the generic word's."""
    means = torch.tensor([[-0.1, 0.0, 9.0], [-0.1, 0.1, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    missed = means[:, None, :] + torch.tensor([-1.0, 1.0])[None, :, None]
    missed[3] = 0
    assert unseen(missed, torch.tensor([True, True, False])).tolist() == [True, False, True, False]
    assert unseen(missed, torch.tensor([True, True, True])).tolist() == [False, False, True, False]


@pytest.mark.parametrize("clear", [True, False])
def test_the_question_changes_no_later_random_number_where_maps_are_clear(
    host: DiffusersHost, monkeypatch: pytest.MonkeyPatch, clear: bool
) -> None:
    monkeypatch.setattr("em_core.method.start.in_doubt", lambda *_: not clear)
    example = example_of(concept_scene(160, "A").only)
    settings = replace(em_settings(host.identity().family).masks, naming_passes=2)
    states = []
    for masks in (settings, replace(settings, naming_passes=0)):
        problem = prepare(host, [example], EMSettings(generic_word="thing", masks=masks))
        states.append(initialise(problem).generator)
    assert torch.equal(*states) is clear


def test_a_doubtful_mask_is_said_and_still_learned_under(host: DiffusersHost) -> None:
    """A star that is not there takes another thing, and the model's error says so."""
    picture = concept_scene(160, "A").only
    example = example_of(replace(picture, prompt="a photo of <none:circle>"))
    found = find_masks(host, example.picture, example.prompt)
    assert found.doubtful == ("none",) and not found.missing
    settings = replace(em_settings(host.identity().family), steps=1)
    problem = prepare(host, [example], settings)
    events = [event for event, _ in learn(problem, initialise(problem))]
    assert events[0].doubtful == {"none": (1,)} == events[-1].doubtful
    assert "may be something else" in say_missing({}, 1, events[0].doubtful)


def noises(*means: float, spread: float = 0.01) -> Tensor:
    """Presence in 16 noises, whose means are given exactly."""
    noise = torch.randn(16, len(means), generator=torch.Generator().manual_seed(0))
    return torch.tensor(means) + spread * (noise - noise.mean(dim=0))


def test_the_least_present_is_left_out_instead_of_the_missing() -> None:
    assert who_is_there(noises(0.1, 0.3, 0.2), missing=[2]) == [1, 2]
    assert who_is_there(noises(0.1, 0.3, 0.2, 0.0), missing=[1, 2]) == [1, 2]
    assert who_is_there(noises(0.1, 0.3, 0.2, 0.0), missing=[1, 3]) == [1, 2]


def test_nothing_changes_where_the_missing_are_least_present_or_the_noises_disagree() -> None:
    assert who_is_there(noises(0.1, 0.3, 0.2), missing=[0]) is None
    wide = noises(0.1, 0.3, 0.2, spread=1.0)
    margin = wide[:, 2] - wide[:, 0]
    assert float(margin.mean() / (margin.std() / 4)) < 2
    assert who_is_there(wide, missing=[2]) is None
    assert who_is_there(noises(0.1, 0.1, 0.1, spread=0.0), missing=[0]) is None


def test_a_name_of_nothing_takes_nothing_from_the_others(host: DiffusersHost) -> None:
    """With a shape in the prompt that the scene lacks, the others keep their masks, more often than not."""
    right = 0
    for seed, absent in ((160, "star"), (161, "heart"), (162, "ring")):
        picture = concept_scene(seed, "A").only
        shapes = {each.shape for each in picture.objects}
        there, ground = picture.prompt.rsplit(" on ", 1)
        other = next(s for s in (absent, "square", "circle", "triangle") if s not in shapes)
        example = example_of(replace(picture, prompt=f"{there} and <none:{other}> on {ground}"))
        found = find_masks(host, example.picture, example.prompt)
        masks = dict(zip(found.names, found.masks, strict=True))
        fine = all(float(iou(masks[name], mask)) > 0.7 for name, mask in example.truth.items())
        right += found.missing == ("none",) and fine
    assert right >= 2


def test_a_right_mask_whose_map_bleeds_is_believed() -> None:
    """The map reaches far over the edge; the region and the refined mask end at it."""
    thing, bled = torch.zeros(1, 16, 16, dtype=torch.bool), torch.zeros(1, 16, 16, dtype=torch.bool)
    thing[:, 4:8, 4:8], bled[:, 2:10, 2:10] = True, True
    guards = Guards()
    assert not guards.accept(thing, bled).any()
    assert guards.accept(thing, bled, anchors=thing).all()
    assert not guards.accept(thing, bled, anchors=~thing).any()


def test_concepts_of_one_word_do_not_take_each_others_place() -> None:
    """Two dogs and a cat: that the first dog is missing says nothing against the second."""
    assert only_alike([0], [0, 2], [(0, 1)])
    assert not only_alike([0], [0, 1], [(0, 1)])
    assert not only_alike([2], [0, 2], [(0, 1)])
    assert not only_alike([0], [1, 2], [(0, 1)])
