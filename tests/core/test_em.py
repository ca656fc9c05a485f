"""The EM loop and the joint phase on the demo model: what moves, what stays, which masks are taken."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from equality import differences
from whole_runs import JOINT, finish

from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.guards import Guards
from em_core.masks.settings import MaskSettings
from em_core.masks.thresholds import min_max
from em_core.method.e_step import (
    e_step_picture,
    latest_maps,
    with_free_statistics,
    without_robbers,
    without_taken,
)
from em_core.method.joint import learn_joint, prior_term
from em_core.method.loop import Step, StepEvent, e_step_due, learn
from em_core.method.m_step import draw, draw_subset, forward_backward, m_step
from em_core.method.maps import Reading, like_noise, noisy_pass, read_attention, with_rivals
from em_core.method.optimizer import learnable, rate_factor
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise, masks_of_vectors, start_vectors
from em_core.method.state import PictureState, RunState, generator_at
from em_core.model.layers import finest_size, mask_layers
from em_core.model.recording import mean_maps
from em_core.model.schedules import VariancePreserving
from em_core.presets import literal
from em_core.prompts import ConceptPrompt, ConceptVectors
from em_core.runs.runner import run
from em_core.settings import EMSettings


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def history(problem: Problem, start: RunState) -> tuple[list[StepEvent], list[RunState]]:
    """The events of the EM loop, and the state at each."""
    steps: list[Step] = list(learn(problem, start))
    return [event for event, _ in steps], [state for _, state in steps]


def test_em_learns_and_beats_its_start(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """In 60 steps the masked loss of the learned tokens falls below that of the start tokens."""
    problem = prepare(host, [example], replace(short, steps=60, e_step_every=20))
    start = initialise(problem)
    state = run(problem, start)

    def loss_of(vectors: ConceptVectors) -> float:
        tried, g = replace(state, vectors=learnable(vectors)), seeded(11)
        return sum(
            float(forward_backward(problem, tried, g)[1]["diffusion"].detach()) for _ in range(40)
        )

    assert loss_of(state.vectors) < 0.98 * loss_of(start.vectors)


@pytest.mark.parametrize("mode", ["em", "fixed", "given", "none"])
def test_what_each_mode_moves(
    host: DiffusersHost, example: Example, short: EMSettings, mode: str
) -> None:
    if mode == "given":
        example = replace(example, masks=example.truth)
    before = host.identity().sample.clone()
    problem = prepare(host, [example], replace(short, mode=mode))
    start = initialise(problem)
    labels = start.pictures[0].labels
    events, states = history(problem, start)
    state = states[-1]
    assert torch.equal(host.identity().sample, before)
    assert [e.step for e in events] == list(range(short.steps + 1))
    assert not any(
        torch.equal(start.vectors[c]["clip_l"], of["clip_l"]) for c, of in state.vectors.items()
    )
    e_steps = [e.step for e in events if e.masks and e.step]
    assert e_steps == ([4, 8, 12] if mode == "em" else [])
    if mode != "em":
        assert torch.equal(state.pictures[0].labels, labels)
    if mode == "given":
        truth = torch.stack([example.truth[n] for n in problem.pictures[0].names])
        assert torch.equal(labels, truth) and events[0].iou == {"rex": 1.0, "doll": 1.0}
    if mode == "none":
        assert labels.all() and not any(e.masks for e in events)


def test_without_masks_on_the_loss_every_sample_has_all_concepts(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Eq. 1 asks for the whole picture, so its prompt has to name all of it."""
    names = example.prompt.names
    for change in ({"mode": "none"}, {"masked_loss": False}):
        problem = prepare(host, [example], replace(short, batch=8, **change))
        drawn = draw(problem, initialise(problem), seeded())
        assert drawn.subsets == (names,) * 8 and bool(drawn.present.all())
    problem = prepare(host, [example], replace(short, batch=8))
    assert len(set(draw(problem, initialise(problem), seeded()).subsets)) > 1


def test_a_pixel_has_one_owner_also_where_a_mask_is_refused() -> None:
    taken = torch.tensor([[[True, True, False]]])
    masks = torch.tensor([[[0.2, 0.9, 0.7]], [[0.1, 0.1, 0.1]]])
    kept, labels = without_taken(taken, masks, masks > 0.5)
    assert torch.equal(kept, torch.tensor([[[0, 0, 0.7]], [[0, 0, 0.1]]]))
    assert torch.equal(labels, torch.tensor([[[False, False, True]], [[False] * 3]]))


def test_an_empty_mask_is_refused(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    masks = {"rex": example.truth["rex"], "doll": torch.zeros_like(example.truth["rex"])}
    problem = prepare(host, [replace(example, masks=masks)], replace(short, mode="given"))
    with pytest.raises(UserError, match="The mask of doll is empty"):
        initialise(problem)


def test_an_autoencoder_that_fails_is_reported(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch
) -> None:
    honest = host.encode_image
    monkeypatch.setattr(host, "encode_image", lambda image: honest(image) * float("nan"))
    with pytest.raises(UserError, match=r"autoencoder .* not finite"):
        prepare(host, [example], short)


def test_whole_weights_are_not_learned_in_half_precision(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], replace(short, steps=1), replace(JOINT, kind="full"))
    state = initialise(problem)
    weight = host.unet.conv_out.weight
    own = weight.data
    try:
        weight.data = own.bfloat16()
        with pytest.raises(UserError, match=r"float32, got torch\.bfloat16"):
            list(learn_joint(problem, state))
    finally:
        weight.data = own


def test_several_pictures_share_a_concept(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    other = Example(example.picture.flip(-1), ConceptPrompt.parse("<doll> on grass"))
    problem = prepare(host, [example, other], short)
    _, concepts = finish(problem)
    assert [set(of) for of in concepts.masks] == [{"rex", "doll"}, {"doll"}]
    assert set(concepts.vectors) == {"rex", "doll"}
    g, state = seeded(), initialise(problem)
    drawn = [draw(problem, state, g) for _ in range(20)]
    assert {(d.index, len(d.present[0])) for d in drawn} == {(0, 2), (1, 1)}


def test_non_square_pictures(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    wide = replace(example, picture=example.picture[:, :40], truth={})
    problem = prepare(host, [wide], replace(short, steps=4))
    state, concepts = finish(problem)
    assert problem.pictures[0].size == (48, 80)
    assert concepts.masks[0]["rex"].shape == (48, 80)
    assert state.pictures[0].maps.shape == (2, 12, 20)


def test_several_vectors_per_concept(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], replace(short, steps=4, vectors=3))
    state, _ = finish(problem)
    conditioning = host.encode_prompts([example.prompt], state.vectors)
    assert [len(p) for p in conditioning.streams["text"].columns[0].values()] == [3, 3]
    assert state.vectors["rex"]["clip_l"].shape == (3, 64)


def test_free_statistics_are_the_maps_of_the_m_step(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Pending are exactly the recorded maps of samples in range, for concepts in their prompts."""
    problem = prepare(host, [example], replace(short, batch=6, union_sampling=True))
    state, drawn, _, maps = m_step(problem, initialise(problem))
    state = with_free_statistics(problem, state, drawn, maps)
    layers = mask_layers(problem.pictures[0].layers, problem.settings.masks.all_layers)
    low, high = (1000 * x for x in problem.settings.masks.timesteps)
    expected, count = torch.zeros(2, 16, 16), torch.zeros(2)
    for b, subset in enumerate(drawn.subsets):
        for k, name in enumerate(("rex", "doll")):
            if name in subset and low <= int(drawn.t[b]) < high:
                expected[k] += sum(maps[layer][b, k].detach() for layer in layers) / len(layers)
                count[k] += 1
    torch.testing.assert_close(state.pictures[0].pending, expected)
    assert torch.equal(state.pictures[0].pending_count, count)


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_reading_does_not_depend_on_the_batch(
    host: DiffusersHost, example: Example, short: EMSettings, batch: int
) -> None:
    """Seven passes, together or by parts: the same times, the same noise, the same mean."""
    problem = prepare(host, [example], short)
    prepared = problem.pictures[0]
    assert finest_size(prepared.layers) == (16, 16)
    vectors = start_vectors(problem, seeded(3))
    by_parts, at_once = (
        read_attention(host, prepared, vectors, short.masks, 7, seeded(0), True, batch=size)
        for size in (batch, 100)
    )
    for of_parts, of_all in zip(
        (*by_parts.halves, by_parts.affinity), (*at_once.halves, at_once.affinity), strict=True
    ):
        torch.testing.assert_close(of_parts, of_all, atol=1e-5, rtol=1e-5)
    weighted = (4 * by_parts.halves[0] + 3 * by_parts.halves[1]) / 7
    torch.testing.assert_close(by_parts.maps, weighted)


def test_reading_takes_the_prompts_orders_in_turn(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Six passes: pairs of the prompt, of the one with its concepts exchanged, and of the prompt again."""
    problem = prepare(host, [example], short)
    prepared, generator = problem.pictures[0], seeded(0)
    vectors, settings = start_vectors(problem, seeded(3)), short.masks
    found = read_attention(host, prepared, vectors, settings, 6, seeded(0)).maps
    prompt = with_rivals(example.prompt, settings.rivals)
    orders = [prompt, prompt.orders()[1], prompt]
    assert str(orders[1]) != str(prompt) and orders[1].orders()[1] == prompt
    t = host.schedule.draw_times(6, generator, *settings.timesteps)
    eps, one_by_one = like_noise(prepared.Z0, 6, generator), []
    wanted = mask_layers(prepared.layers, settings.all_layers)
    for index in range(6):
        conditioning = host.encode_prompts([orders[index // 2]], vectors)
        here = slice(index, index + 1)
        recorder = noisy_pass(host, prepared, conditioning, wanted, t[here], eps[here], {})
        one_by_one.append(mean_maps(recorder.maps, wanted, (16, 16))[0, :2])
    torch.testing.assert_close(found, torch.stack(one_by_one).mean(dim=0), atol=1e-5, rtol=1e-5)
    as_it_is = replace(settings, orders=False)
    plain = read_attention(host, prepared, vectors, as_it_is, 6, seeded(0)).maps
    assert float((plain - found).abs().max()) > 1e-3


def test_literal_loop_estimates_after_every_step(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], literal(replace(short, steps=3)))
    events, _ = history(problem, initialise(problem))
    assert [e.masks for e in events] == [True, True, True, True]


def test_union_sampling_draws_every_ordered_subset(short: EMSettings) -> None:
    g = torch.Generator().manual_seed(0)
    sampled = replace(short, union_sampling=True)
    drawn = {draw_subset(("a", "b", "c"), sampled, g) for _ in range(400)}
    assert len(drawn) == 3 + 6 + 6
    assert draw_subset(("a", "b", "c"), replace(short, union_sampling=False), g) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("decay_after", "every"), [(None, 7), (40, 10), (30, 7), (5, 1), (300, 20)]
)
def test_e_steps_are_as_far_apart_as_learning(
    short: EMSettings, decay_after: int | None, every: int
) -> None:
    """Between two E-steps the learning rates add up to as much as `e_step_every` full ones."""
    settings = replace(short, steps=200, decay_after=decay_after, e_step_every=every)
    due = [step for step in range(1, 201) if e_step_due(settings, step)]
    rates = [rate_factor(step, decay_after) for step in range(200)]
    learned = [sum(rates[a:b]) for a, b in pairwise([0, *due])]
    assert due[-1] == 200
    assert all(abs(between - every) < 1.1 for between in learned[:-1])
    full = [step for step in range(1, 201) if step <= (decay_after or 200)]
    assert [s for s in due[:-1] if s in full] == [s for s in full if s % every == 0 and s < 200]


def test_every_step_draws_anew(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """No two states of a run go on with the same randomness, in neither phase."""
    settings = replace(short, steps=4, e_step_every=2, masks=replace(short.masks, init_timesteps=4))
    problem = prepare(host, [example], settings, replace(JOINT, kind="lora", steps=3))
    _, states = history(problem, initialise(problem))
    states += [state for _, state in learn_joint(problem, states[-1])]
    assert len({bytes(state.generator.tolist()) for state in states}) == len(states) == 1 + 4 + 3


def test_flipped_samples_see_the_mirrored_picture(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], replace(short, flip=True))
    g, prepared, state = seeded(), problem.pictures[0], initialise(problem)
    mirrored = host.encode_image(example.picture.flip(-1)[None] * 2 - 1)
    seen = {drawn.flipped: drawn.Z0[:1] for drawn in (draw(problem, state, g) for _ in range(20))}
    assert torch.equal(seen[True], mirrored) and torch.equal(seen[False], prepared.Z0)


def test_gradient_of_the_vectors_by_finite_differences(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """The whole path vectors -> text encoder -> UNet -> both losses, along a random direction."""
    problem = prepare(host, [example], replace(short, union_sampling=False))
    state = initialise(problem)
    vectors = learnable(state.vectors)
    v = vectors["rex"]["clip_l"]

    def loss() -> float:
        v.grad, g = None, generator_at(state.generator)
        _, terms, _ = forward_backward(problem, replace(state, vectors=vectors), g)
        return float(terms["total"].detach())

    loss()
    gradient = v.grad.clone()
    direction = torch.randn(v.shape, generator=seeded())
    step = 3e-2 * v.detach().norm() / direction.norm() * direction
    v.data += step
    high = loss()
    v.data -= 2 * step
    low = loss()
    assert high - low == pytest.approx(float(2 * (gradient * step).sum()), rel=0.1, abs=2e-5)


def test_masks_of_given_vectors(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """Reading masks changes neither vectors nor model, and is a function of the generator's seed."""
    problem = prepare(host, [example], short)
    vectors = start_vectors(problem, seeded())
    before, weights = learnable(vectors), {n: p.clone() for n, p in host.weights("full").items()}
    read = [
        masks_of_vectors(host, problem.pictures[0], vectors, short.masks, (), seeded(seed))
        for seed in (1, 1, 2)
    ]
    assert not differences(read[0], read[1])
    assert not torch.equal(read[0].maps, read[2].maps)
    assert not differences(vectors, before) and not differences(host.weights("full"), weights)


def without_words(example: Example) -> Example:
    return replace(example, prompt=ConceptPrompt.parse("a photo of <rex> and <doll> on grass"))


def test_concepts_without_words_start_from_the_generic_word(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """And from random vectors where the settings give no such word, as the paper does."""
    problem = prepare(host, [without_words(example)], short)
    start, thing = start_vectors(problem, seeded()), host.initial_vectors("thing", 1, seeded())
    assert not differences(start["rex"], thing) and not differences(start["doll"], thing)
    problem = prepare(host, [without_words(example)], replace(short, generic_word=""))
    start = start_vectors(problem, seeded())
    assert differences(start["rex"], start["doll"])


SIDE = 64
LEFT, RIGHT, TOP = (torch.zeros(SIDE, SIDE, dtype=torch.bool) for _ in range(3))
LEFT[:, : SIDE // 2], RIGHT[:, SIDE // 2 :], TOP[: SIDE // 2] = True, True, True
SPECK = torch.zeros_like(LEFT)
SPECK[0, -1] = True


def picture_state(*labels: torch.Tensor, found: tuple[bool, ...] = (True, True)) -> PictureState:
    """Something is pending, and the masks are softer than the labels."""
    stacked = torch.stack(labels)
    ones = torch.ones(len(labels), SIDE, SIDE)
    return PictureState(
        ones, ones, torch.ones(len(labels)), 0.75 * stacked, stacked, torch.tensor(found)
    )


@pytest.fixture
def new_masks(host: DiffusersHost, example: Example, short: EMSettings, monkeypatch):
    """The E-step of one picture from given maps, judged by others."""

    def estimate(
        maps: list[torch.Tensor], judge: list[torch.Tensor], before: PictureState, **change
    ) -> PictureState:
        options = {"threshold": 0.5, "crf": None, "acceptance": 1.0, "regions": None} | change
        problem = prepare(host, [example], replace(short, masks=MaskSettings(**options)))
        both = torch.stack(maps).float(), torch.stack(judge).float()
        monkeypatch.setattr("em_core.method.e_step.latest_maps", lambda *_: both)
        state, prepared = RunState({}, seeded().get_state(), (before,)), problem.pictures[0]
        return e_step_picture(problem, state, prepared, before, seeded(), prepared.names)

    return estimate


def test_a_new_mask_is_taken_where_fresh_maps_agree_with_it_as_well(new_masks) -> None:
    """More than with the present one, and exactly as much; the new maps are kept."""
    before = picture_state(TOP & LEFT, RIGHT)
    after = new_masks([LEFT, RIGHT], [LEFT, RIGHT], before)
    expected = torch.stack([LEFT, RIGHT])
    assert torch.equal(after.labels, expected) and torch.equal(after.masks, expected.float())
    assert torch.equal(after.maps, expected.float())
    assert not after.pending.any() and not after.pending_count.any()


def test_a_new_mask_that_fresh_maps_agree_with_less_is_refused(new_masks) -> None:
    """However well its own maps agree with it. The maps are kept all the same."""
    before = picture_state(TOP & LEFT, RIGHT)
    after = new_masks([LEFT, RIGHT], [TOP & LEFT, RIGHT], before)
    assert torch.equal(after.labels, before.labels)
    assert torch.equal(after.maps[0], LEFT.float())


@pytest.mark.parametrize(("acceptance", "taken"), [(0.0, True), (0.55, True), (0.6, False)])
def test_acceptance_is_the_share_of_the_present_agreement(
    new_masks, acceptance: float, taken: bool
) -> None:
    """The correlation of a half with a quarter of it is 1 / sqrt(3) = 0.577."""
    before = picture_state(TOP & LEFT, RIGHT)
    after = new_masks([LEFT, RIGHT], [TOP & LEFT, RIGHT], before, acceptance=acceptance)
    assert torch.equal(after.labels[0], LEFT if taken else TOP & LEFT)


def test_the_start_speaks_too(new_masks) -> None:
    """Fresh maps alone agree with the new mask 1.73 times as well; with the start's, 1.04 times."""
    alone = picture_state(TOP & LEFT, RIGHT)
    both = replace(alone, first=torch.stack([TOP & LEFT, RIGHT]).float())
    for before, acceptance, taken in ((alone, 1.7, True), (both, 1.05, False), (both, 1.03, True)):
        after = new_masks([LEFT, RIGHT], [LEFT, RIGHT], before, acceptance=acceptance)
        assert torch.equal(after.labels[0], LEFT if taken else TOP & LEFT)


def test_what_the_model_names_counts_too(new_masks) -> None:
    """The new mask agrees with the maps 1.73 times as well. It holds a region beside the present one's;
    a mean of -0.5 over both makes that 1.73 exp(-0.5 - 0.2) = 0.86 times, of 0.1 it is 1.57 times."""
    regions = torch.stack([TOP & LEFT, ~TOP & LEFT, RIGHT]).int().argmax(dim=0)
    known = picture_state(TOP & LEFT, RIGHT)
    assert (TOP & LEFT).sum() == (~TOP & LEFT).sum()
    for below, taken in ((-1.2, False), (0.0, True)):
        named = torch.tensor([[0.2, below, -1.0], [0.0, 0.0, 1.0]])
        before = replace(known, regions=regions, named=named)
        for acceptance in (1.0, 1.05):
            after = new_masks([LEFT, RIGHT], [LEFT, RIGHT], before, acceptance=acceptance)
            assert torch.equal(after.labels[0], LEFT if taken else TOP & LEFT)
        after = new_masks([LEFT, RIGHT], [LEFT, RIGHT], before, acceptance=1.6)
        assert torch.equal(after.labels[0], TOP & LEFT)


def test_a_mask_s_rim_is_judged_by_the_maps_alone(new_masks) -> None:
    """The present mask has an IoU of 3/4 with the new one, or just less, and all that it lacks is named
    another thing. With that, the new one is worth less: exp(1) times .775 against exp(.5)."""
    for width, taken in ((24, True), (23, False)):
        part = LEFT.clone()
        part[:, width:] = False
        regions = torch.stack([part, LEFT & ~part, RIGHT]).int().argmax(dim=0)
        named = torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 1.0]])
        before = replace(picture_state(part, RIGHT), regions=regions, named=named)
        after = new_masks([LEFT, RIGHT], [LEFT, RIGHT], before)
        assert torch.equal(after.labels[0], LEFT if taken else part)


def test_a_new_mask_that_the_guards_refuse_is_not_taken(new_masks) -> None:
    """A speck stays out, beside a mask that is taken; without the guard it comes in."""
    before = picture_state(TOP & LEFT, TOP & RIGHT)
    maps = [LEFT, SPECK]
    after = new_masks(maps, maps, before)
    assert torch.equal(after.labels, torch.stack([LEFT, TOP & RIGHT]))
    assert torch.equal(after.masks, torch.stack([LEFT.float(), 0.75 * (TOP & RIGHT)]))
    after = new_masks(maps, maps, before, guards=Guards(min_area=0.0))
    assert torch.equal(after.labels, torch.stack([LEFT, SPECK]))


@pytest.mark.parametrize("competition", [True, False])
def test_a_refused_concept_loses_the_pixels_that_another_takes(
    new_masks, competition: bool
) -> None:
    """The second keeps its old mask, but for what the first has taken; without competition, all."""
    before = picture_state(RIGHT, TOP)
    after = new_masks([LEFT, RIGHT], [LEFT, TOP], before, competition=competition)
    kept = TOP & ~LEFT if competition else TOP
    assert torch.equal(after.labels, torch.stack([LEFT, kept]))
    assert torch.equal(after.masks, torch.stack([LEFT.float(), 0.75 * kept]))
    assert after.found.tolist() == [True, True]


@pytest.mark.parametrize("competition", [True, False])
def test_a_mask_that_robs_another_of_more_than_it_gains_is_refused(
    new_masks, competition: bool
) -> None:
    """Both names are drawn to the right half, where the second is already; the first stays. It would gain
    1 - 1 / sqrt(3), and the second lose 1. Where masks may overlap, no one is robbed."""
    before = picture_state(TOP & RIGHT, RIGHT)
    before = replace(before, labels=torch.stack([TOP & RIGHT, RIGHT & ~TOP]))
    after = new_masks([RIGHT, SPECK], [RIGHT, RIGHT & ~TOP], before, competition=competition)
    expected = before.labels if competition else torch.stack([RIGHT, RIGHT & ~TOP])
    assert torch.equal(after.labels, expected) and after.found.tolist() == [True, True]


def test_the_worst_robber_is_refused_first() -> None:
    """And one that is refused stays, so that others rob it too."""
    every = torch.ones(3, dtype=torch.bool)
    gained = torch.tensor([0.1, 0.3, 0.2])
    lost = torch.tensor([[1.0, 0.0, 0.0], [0.4, 1.0, 0.1], [0.1, 0.0, 1.0]])
    assert without_robbers(every, gained, lost).all()
    for stays, left in ((0, [2]), (1, [0, 2]), (2, [0, 1])):
        accepted = every.clone()
        accepted[stays] = False
        assert without_robbers(accepted, gained, lost).nonzero().flatten().tolist() == left


def test_a_mask_of_which_nothing_is_left_counts_as_not_found(new_masks) -> None:
    before = picture_state(RIGHT, TOP & LEFT)
    after = new_masks([LEFT, SPECK], [LEFT, TOP & LEFT], before)
    assert not after.labels[1].any() and after.found.tolist() == [True, False]


def test_a_concept_that_was_not_found_takes_the_first_mask_that_is_believed(new_masks) -> None:
    """Its old labels are not a mask that a new one has to agree better than."""
    before = picture_state(LEFT, SPECK, found=(True, False))
    after = new_masks([LEFT, RIGHT], [LEFT, SPECK], before)
    assert torch.equal(after.labels[1], RIGHT) and after.found.tolist() == [True, True]


@pytest.mark.parametrize(("refresh", "acceptance"), [(0, 1.0), (3, 1.0), (3, 0.0), (1, 1.0)])
def test_latest_maps_are_the_mean_of_all_passes_since(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch, refresh, acceptance
) -> None:
    """Five free maps of <rex> and none of <doll>, and the refresh's; without any, the old maps stay.

    The judge is the half of the refresh that is held back; all is used where nothing is judged.
    """
    masks = replace(short.masks, acceptance=acceptance)
    problem = prepare(host, [example], replace(short, refresh=refresh, masks=masks))
    state, seen = initialise(problem), []
    free, one, other = torch.rand(3, 2, 16, 16, generator=seeded())
    free[1] = 0
    reading = Reading((2 * one + other) / 3, (one, other), None)

    def read(host, prepared, vectors, settings, passes, generator) -> Reading:
        seen.append(passes)
        return reading

    monkeypatch.setattr("em_core.method.e_step.read_attention", read)
    picture = replace(state.pictures[0], pending=free, pending_count=torch.tensor([5.0, 0.0]))
    found, judge = latest_maps(problem, state, problem.pictures[0], picture, seeded())
    used, count = (one, 2) if refresh == 3 and acceptance else (reading.maps, refresh)
    rex = min_max((free[0] + count * used[0]) / (5 + count))
    doll = min_max(used[1]) if refresh else picture.maps[1]
    torch.testing.assert_close(found, torch.stack([rex, doll]))
    assert torch.equal(judge, other if refresh == 3 and acceptance else found)
    assert seen == ([refresh] if refresh else [])


class Doubled(VariancePreserving):
    """The same process, each sample counted twice."""

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, 2.0)


@pytest.mark.parametrize("masked_loss", [True, False])
def test_a_schedule_of_weight_two_doubles_the_diffusion_loss(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch, masked_loss: bool
) -> None:
    """The loss and its gradient, and the loss of the prior's pictures; the attention loss stays."""
    settings = replace(short, masked_loss=masked_loss)
    problem = prepare(host, [example], settings, replace(JOINT, prior_weight=1.0))
    alone = replace(problem, settings=replace(settings, attention_weight=0.0))
    state = initialise(problem)

    def measure() -> tuple[dict[str, float], torch.Tensor]:
        vectors = learnable(state.vectors)
        tried = replace(state, vectors=vectors)
        _, terms, _ = forward_backward(problem, tried, seeded())
        vectors["rex"]["clip_l"].grad = None
        forward_backward(alone, tried, seeded())
        with host.trainable("lora", {}, seeded()):
            terms |= prior_term(problem, problem.pictures[0].Z0, seeded())
        values = {name: float(value.detach()) for name, value in terms.items()}
        return values, vectors["rex"]["clip_l"].grad

    once, gradient = measure()
    schedule = host.schedule
    monkeypatch.setattr(host, "schedule", Doubled(schedule.alphas_cumprod, schedule.prediction))
    twice, doubled = measure()
    for name in ("diffusion", "prior"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-5)
    assert twice["attention"] == once["attention"]
    torch.testing.assert_close(doubled, 2 * gradient, atol=1e-7, rtol=1e-4)
