"""The EM loop on the demo model: what moves, what stays, and that a stop changes nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from em_core.errors import TrainingError, UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.e_step import average_rounds, gather, outside
from em_core.method.joint import learn_joint
from em_core.method.loop import learn
from em_core.method.m_step import draw, draw_subset, forward_backward, m_step
from em_core.method.maps import average_maps
from em_core.method.problem import Problem, prepare
from em_core.method.start import (
    attention_masks,
    blank_state,
    choose_random_starts,
    initialise,
    resume,
)
from em_core.method.state import RunState
from em_core.model.layers import map_side, mask_layers
from em_core.presets import literal
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import run
from em_core.settings import EMSettings, JointSettings

JOINT = JointSettings(steps=4, learning_rate=1e-3)


def finish(problem: Problem) -> tuple[RunState, ConceptSet]:
    state = initialise(problem)
    assert run(problem, state)
    return state, conclude(problem, state)


def same(a: ConceptSet, b: ConceptSet) -> bool:
    """Tokens, weights, masks and curves equal bit for bit."""
    tensors = [
        [v for of in c.vectors.values() for v in of.values()]
        + [c.weights[n] for n in sorted(c.weights)]
        + [m for of in c.masks for m in of.values()]
        for c in (a, b)
    ]
    equal = all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
    return equal and a.curves == b.curves and sorted(a.weights) == sorted(b.weights)


def test_em_learns_and_beats_its_start(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Over 80 steps the masked loss of the learned tokens falls below that of the start tokens."""
    problem = prepare(host, [example], replace(short, steps=60, e_step_every=20))
    state = initialise(problem)
    start = {c: {e: v.detach().clone() for e, v in of.items()} for c, of in state.vectors.items()}
    run(problem, state)

    def loss_of(vectors) -> float:
        fresh = replace_vectors(state, vectors)
        fresh.generator.manual_seed(11)
        return sum(
            float(forward_backward(problem, fresh)[1]["diffusion"].detach()) for _ in range(40)
        )

    learned = {c: {e: v.detach().clone() for e, v in of.items()} for c, of in state.vectors.items()}
    assert loss_of(learned) < 0.98 * loss_of(start)


def replace_vectors(state: RunState, vectors) -> RunState:
    with torch.no_grad():
        for c, of in vectors.items():
            for e, v in of.items():
                state.vectors[c][e].copy_(v)
    return state


@pytest.mark.parametrize("mode", ["em", "fixed", "given", "none"])
def test_what_each_mode_moves(
    host: DiffusersHost, example: Example, short: EMSettings, mode: str
) -> None:
    if mode == "given":
        example = replace(example, masks=example.truth)
    before = host.identity().sample.clone()
    problem = prepare(host, [example], replace(short, mode=mode))
    state = initialise(problem)
    vectors = {c: of["clip_l"].detach().clone() for c, of in state.vectors.items()}
    labels = state.pictures[0].labels.clone()
    events = list(learn(problem, state))
    assert torch.equal(host.identity().sample, before)
    assert [e.step for e in events] == list(range(short.steps + 1))
    assert all(not torch.equal(vectors[c], of["clip_l"]) for c, of in state.vectors.items())
    e_steps = [e.step for e in events if e.masks and e.step]
    assert e_steps == ([4, 8, 12] if mode == "em" else [])
    if mode != "em":
        assert torch.equal(state.pictures[0].labels, labels)
    if mode == "given":
        truth = torch.stack([example.truth[n] for n in problem.pictures[0].names])
        assert torch.equal(labels, truth) and events[0].iou == {"rex": 1.0, "doll": 1.0}
    if mode == "none":
        assert labels.all() and not any(e.masks for e in events)


@pytest.mark.parametrize("kind", ["none", "lora", "cross_attention", "full"])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, kind: str
) -> None:
    problem = prepare(host, [example], short, replace(JOINT, kind=kind))
    sample = host.identity().sample.clone()
    _, whole = finish(problem)
    last = short.steps + (0 if kind == "none" else JOINT.steps)
    for cut in {1, 4, 6, short.steps, last - 1}:
        state, seen = initialise(problem), iter(range(1000))
        file = tmp_path / f"{cut}.safetensors"
        assert not run(
            problem, state, state_file=file, stop=lambda seen=seen, cut=cut: next(seen) == cut
        )
        again = resume(problem, file)
        assert run(problem, again)
        assert same(conclude(problem, again), whole), f"cut at {cut}"
        assert torch.equal(host.identity().sample, sample)


def test_a_state_saved_right_after_resuming_keeps_the_moments(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    """The joint phase builds its optimizer late; until then what was loaded must not be lost."""
    problem = prepare(host, [example], short, replace(JOINT, kind="lora"))
    state, file, seen = initialise(problem), tmp_path / "s.safetensors", iter(range(1000))
    run(problem, state, state_file=file, stop=lambda: next(seen) == short.steps + 2)
    resume(problem, file).to_file(tmp_path / "again.safetensors")
    kept, again = load_file(file), load_file(tmp_path / "again.safetensors")
    assert any(n.startswith("optimizer/") for n in kept)
    assert kept.keys() == again.keys() and all(torch.equal(kept[n], again[n]) for n in kept)


def test_the_end_of_the_em_phase_is_on_disk_before_the_joint_phase(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    problem = prepare(host, [example], short, replace(JOINT, kind="lora", prior_weight=1.0))
    state, file = initialise(problem), tmp_path / "s.safetensors"

    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("drawing the prior failed")

    monkeypatch.setattr(host, "generate", fail)
    with pytest.raises(RuntimeError, match="drawing"):
        run(problem, state, state_file=file)
    kept = resume(problem, file)
    assert (kept.phase, kept.step, kept.finished) == ("em", short.steps, True)


def test_same_seed_same_result_other_seed_another(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    short = replace(short, steps=4)
    results = [finish(prepare(host, [example], replace(short, seed=s)))[1] for s in (1, 1, 2)]
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_a_state_belongs_to_its_run(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    problem = prepare(host, [example], short)
    initialise(problem).to_file(tmp_path / "s.safetensors")
    other = prepare(host, [example], replace(short, learning_rate=1e-3))
    with pytest.raises(UserError, match="belongs to a run with other"):
        resume(other, tmp_path / "s.safetensors")


def test_without_masks_on_the_loss_every_sample_has_all_concepts(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Eq. 1 asks for the whole picture, so its prompt has to name all of it."""
    names = example.prompt.names
    for change in ({"mode": "none"}, {"masked_loss": False}):
        problem = prepare(host, [example], replace(short, batch=8, **change))
        drawn = draw(problem, initialise(problem))
        assert drawn.subsets == (names,) * 8 and bool(drawn.present.all())
    problem = prepare(host, [example], replace(short, batch=8))
    assert len(set(draw(problem, initialise(problem)).subsets)) > 1


def test_a_pixel_has_one_owner_also_where_a_mask_is_refused() -> None:
    taken = torch.tensor([[[True, True, False]]])
    masks = torch.tensor([[[0.2, 0.9, 0.7]], [[0.1, 0.1, 0.1]]])
    kept, labels = outside(taken, masks, masks > 0.5)
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


def test_attention_that_is_not_finite_is_never_taken_over(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    """What is on disk afterwards can still be resumed."""
    problem = prepare(host, [example], short)
    state, file = initialise(problem), tmp_path / "s.safetensors"
    run(problem, state, state_file=file, stop=lambda: state.step == 2)
    weight = host.unet.get_parameter(
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    )
    before = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(TrainingError, match="not finite"):
            run(problem, state, state_file=file)
        with pytest.raises(TrainingError, match="attention is not finite"):
            initialise(problem)
    finally:
        weight.data.copy_(before)
    assert resume(problem, file).step == 2


def test_whole_weights_are_not_learned_in_half_precision(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], replace(short, steps=1), replace(JOINT, kind="full"))
    state = initialise(problem)
    weight = host.unet.conv_out.weight
    try:
        weight.data = weight.data.bfloat16()
        with pytest.raises(UserError, match=r"float32, got torch\.bfloat16"):
            list(learn_joint(problem, state))
    finally:
        weight.data = weight.data.float()


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    problem = prepare(host, [example], short)
    state, file = initialise(problem), tmp_path / "s.safetensors"
    events = learn(problem, state)
    for _ in range(4):
        next(events)
    held = {c: of["clip_l"].detach().clone() for c, of in state.vectors.items()}
    honest = host.predict_noise
    monkeypatch.setattr(host, "predict_noise", lambda *a: honest(*a) * float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 4"):
        run(problem, state, state_file=file)
    assert all(torch.equal(held[c], of["clip_l"]) for c, of in state.vectors.items())
    monkeypatch.undo()
    again = resume(problem, file)
    assert again.step == 3
    assert all(torch.equal(held[c], of["clip_l"]) for c, of in again.vectors.items())


def test_several_pictures_share_a_concept(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    other = Example(example.picture.flip(-1), ConceptPrompt.parse("<doll> on grass"))
    problem = prepare(host, [example, other], short)
    _, concepts = finish(problem)
    assert [set(of) for of in concepts.masks] == [{"rex", "doll"}, {"doll"}]
    assert set(concepts.vectors) == {"rex", "doll"}


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
    assert [len(p) for p in conditioning.columns[0].values()] == [3, 3]
    assert state.vectors["rex"]["clip_l"].shape == (3, 64)


def test_free_statistics_are_the_maps_of_the_m_step(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """`gather` adds exactly the recorded maps of samples in range, for concepts in their prompts."""
    problem = prepare(host, [example], replace(short, batch=6, union_sampling=True))
    state = initialise(problem)
    drawn, _, maps = m_step(problem, state)
    gather(problem, state, drawn, maps)
    layers = mask_layers(host.layers, (16, 16), problem.settings.masks.all_layers)
    low, high = (1000 * x for x in problem.settings.masks.timesteps)
    expected, count = torch.zeros(2, 16, 16), torch.zeros(2)
    for b, subset in enumerate(drawn.subsets):
        for k, name in enumerate(("rex", "doll")):
            if name in subset and low <= int(drawn.t[b]) < high:
                expected[k] += sum(maps[layer][b, k].detach() for layer in layers) / len(layers)
                count[k] += 1
    torch.testing.assert_close(state.pictures[0].pending, expected)
    assert torch.equal(state.pictures[0].pending_count, count)


@pytest.mark.parametrize(
    ("averaging", "weights"),
    (("all", (1, 1, 1, 1, 1)), ("latest", (0, 0, 0, 0, 1))),
)
def test_rounds_average_as_stochastic_approximation(
    averaging: str,
    weights: tuple[int, ...],
    host: DiffusersHost,
    example: Example,
    short: EMSettings,
) -> None:
    """Step by step the same as the weighted mean of all rounds at once, the start being round 1."""
    settings = replace(short, averaging=averaging)
    picture = initialise(prepare(host, [example], settings)).pictures[0]
    rounds = [picture.maps, *(torch.rand(2, 16, 16) for _ in range(4))]
    for latest in rounds[1:]:
        picture = replace(
            picture, maps=average_rounds(picture, latest, settings), rounds=picture.rounds + 1
        )
    w = torch.tensor(weights).float()[:, None, None, None]
    torch.testing.assert_close(picture.maps, (w * torch.stack(rounds)).sum(dim=0) / w.sum())


def test_average_maps_does_not_depend_on_the_batch(
    host: DiffusersHost, example: Example, short
) -> None:
    problem = prepare(host, [example], short)
    prepared, state = problem.pictures[0], initialise(problem)
    conditioning = host.encode_prompts([example.prompt], state.vectors)
    assert map_side(prepared.latent_size, host.layers) == (16, 16)
    once = [
        average_maps(
            host, prepared.Z0, conditioning, prepared.names, 1, short.masks,
            torch.Generator().manual_seed(s), batch=1,
        )
        for s in (0, 0)
    ]  # fmt: skip
    assert torch.equal(*once)


def test_literal_loop_estimates_after_every_step(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], literal(replace(short, steps=3)))
    events = list(learn(problem, initialise(problem)))
    assert [e.masks for e in events] == [True, True, True, True]


def test_union_sampling_draws_every_ordered_subset(short: EMSettings) -> None:
    g = torch.Generator().manual_seed(0)
    sampled = replace(short, union_sampling=True)
    drawn = {draw_subset(("a", "b", "c"), sampled, g) for _ in range(400)}
    assert len(drawn) == 3 + 6 + 6
    assert draw_subset(("a", "b", "c"), replace(short, union_sampling=False), g) == ("a", "b", "c")


def test_early_stop(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """With a threshold that every change passes, the run ends after `patience` E-steps."""
    problem = prepare(host, [example], replace(short, patience=2, settled=1.1))
    assert len(list(learn(problem, initialise(problem)))) == 1 + 8


def test_flipped_samples_see_the_mirrored_picture(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    problem = prepare(host, [example], replace(short, flip=True))
    state, prepared = initialise(problem), problem.pictures[0]
    mirrored = host.encode_image(example.picture.flip(-1)[None] * 2 - 1)
    seen = {drawn.flipped: drawn.Z0[:1] for drawn in (draw(problem, state) for _ in range(20))}
    assert torch.equal(seen[True], mirrored) and torch.equal(seen[False], prepared.Z0)


def test_gradient_of_the_vectors_by_finite_differences(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """The whole path vectors -> text encoder -> UNet -> both losses, along a random direction."""
    problem = prepare(host, [example], replace(short, union_sampling=False))
    state = initialise(problem)
    v = state.vectors["rex"]["clip_l"]
    rng = state.generator.get_state()

    def loss() -> float:
        state.generator.set_state(rng)
        state.optimizer.zero_grad()
        return float(forward_backward(problem, state)[1]["total"].detach())

    loss()
    gradient = v.grad.clone()
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    step = 3e-2 * v.detach().norm() / direction.norm() * direction
    v.data += step
    high = loss()
    v.data -= 2 * step
    low = loss()
    assert high - low == pytest.approx(float(2 * (gradient * step).sum()), rel=0.1, abs=2e-5)


def test_masks_of_given_vectors(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """Reading masks changes neither vectors nor model, and is a function of the generator's seed."""
    problem = prepare(host, [example], short)
    state = initialise(problem)
    read = [
        attention_masks(
            problem, problem.pictures[0], state.vectors, 10, torch.Generator().manual_seed(1)
        )
        for _ in range(2)
    ]
    assert torch.equal(read[0][0], read[1][0]) and torch.equal(read[0][1].masks, read[1][1].masks)


def without_words(example: Example) -> Example:
    return replace(example, prompt=ConceptPrompt.parse("a photo of <rex> and <doll> on grass"))


def test_random_starts_are_the_draw_whose_weakest_mask_has_most_contrast(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Against a search written out: every draw's masks under the same noise."""
    problem = prepare(host, [without_words(example)], replace(short, random_starts=4, seed=1))
    chosen, single = blank_state(problem), blank_state(problem)
    choose_random_starts(problem, chosen)
    g = single.generator
    noise = g.get_state()
    draws = [{n: of["clip_l"].detach().clone() for n, of in single.vectors.items()}]
    for _ in range(3):
        draws.append({n: host.initial_vectors("", 1, g)["clip_l"] for n in single.vectors})
    weakest = []
    for tried in draws:
        g.set_state(noise)
        vectors = {n: {"clip_l": v} for n, v in tried.items()}
        _, estimate = attention_masks(problem, problem.pictures[0], vectors, 8, g)
        weakest.append(float(estimate.contrast.min()))
    best = draws[weakest.index(max(weakest))]
    assert best is not draws[0], (
        "this seed shows nothing; take one whose first draw is not the best"
    )
    assert all(torch.equal(chosen.vectors[n]["clip_l"], v) for n, v in best.items())


def test_words_leave_nothing_to_draw(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """With words, and in the modes without first masks, the number of draws changes nothing."""
    for ex, mode in ((example, "em"), (without_words(example), "none")):
        one, many = (
            initialise(prepare(host, [ex], replace(short, mode=mode, random_starts=n)))
            for n in (1, 16)
        )
        assert torch.equal(one.generator.get_state(), many.generator.get_state())
        for name, of in one.vectors.items():
            assert torch.equal(of["clip_l"], many.vectors[name]["clip_l"])


def test_a_concept_with_words_keeps_its_words_start(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    mixed = replace(
        example, prompt=ConceptPrompt.parse("a photo of <rex:star> and <doll> on grass")
    )
    problem = prepare(host, [mixed], replace(short, random_starts=4, seed=1))
    blank, state = blank_state(problem), initialise(problem)
    assert torch.equal(state.vectors["rex"]["clip_l"], blank.vectors["rex"]["clip_l"])
    assert not torch.equal(state.vectors["doll"]["clip_l"], blank.vectors["doll"]["clip_l"])


def test_random_starts_are_judged_by_few_pictures(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five pictures: the first two of <rex>, and the one of <doll>; those without either never."""
    prompts = [
        "star on grass",
        "<rex> on grass",
        "<rex> on sand",
        "<rex> on wood",
        "<doll> on grass",
    ]
    examples = [
        Example(example.picture, ConceptPrompt.parse(text.replace("star", "<x:star>")))
        for text in prompts
    ]
    problem = prepare(host, examples, replace(short, random_starts=2))
    seen = []

    def note(problem, prepared, vectors, passes, g):
        seen.append(str(prepared.example.prompt))
        return attention_masks(problem, prepared, vectors, passes, g)

    monkeypatch.setattr("em_core.method.start.attention_masks", note)
    choose_random_starts(problem, blank_state(problem))
    assert seen == [prompts[i] for i in (1, 2, 4)] * 2
