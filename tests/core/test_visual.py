"""The visual phase: what a step computes, what learns, and that a stopped run goes on bit for bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equality import differences
from test_image_attention import PlainBlock, brute_force
from toy_host import ToyHost

from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.m_step import Draw, draw
from em_core.method.optimizer import learnable
from em_core.method.problem import Problem, prepare
from em_core.method.references import KEPT, Move, References, draw_move, moved
from em_core.method.start import initialise
from em_core.method.state import RunState, generator_at
from em_core.method.visual import Look, choose, forward_backward, places_of, regulariser
from em_core.model.visual import blocks_of, init_blocks
from em_core.presets import vico, visual_settings
from em_core.runs.concept_set import ConceptSet
from em_core.runs.learning import learn_concepts
from em_core.runs.runner import finished, run
from em_core.runs.state_file import StateFile
from em_core.runs.store import RunStore
from em_core.runs.visual import learn_visual
from em_core.runs.visual_condition import VisualCondition
from em_core.settings import EMSettings, JointSettings, VisualSettings


@pytest.fixture(scope="module")
def visual(host: DiffusersHost) -> VisualSettings:
    return replace(visual_settings(host.identity().family), steps=4)


@pytest.fixture
def brief(short: EMSettings) -> EMSettings:
    masks = replace(short.masks, init_timesteps=4)
    return replace(short, steps=2, e_step_every=2, refresh=1, masks=masks)


def one(example: Example) -> Example:
    """The example with its first concept alone in the prompt."""
    name = example.prompt.names[0]
    prompt = example.prompt.subset([name])
    return replace(example, prompt=prompt, truth={name: example.truth[name]})


Parts = tuple[Problem, RunState, Draw, Look, dict]


def parts_of(problem: Problem, seed: int = 0) -> Parts:
    """What a step works on, with blocks that do something."""
    state = initialise(problem)
    assert problem.visual is not None
    problem = replace(problem, settings=replace(problem.settings, batch=problem.visual.batch))
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(problem, state, generator)
    places, names = places_of(problem), [c.name for c in problem.concepts]
    values = init_blocks(places, names, generator, zero=False)
    values = {n: v.requires_grad_() for n, v in values.items()}
    references = References(problem, state.pictures, [p.names for p in problem.pictures])
    look = choose(problem, drawn, references, blocks_of(values, places), generator)
    return problem, replace(state, vectors=learnable(state.vectors)), drawn, look, values


def terms_of(parts: Parts, visual: VisualSettings) -> dict[str, torch.Tensor]:
    problem, state, drawn, look, values = parts
    blocks = blocks_of(values, places_of(problem))
    return forward_backward(problem, state, drawn, look, blocks, visual)


@contextmanager
def hooked(module: torch.nn.Module, hook) -> Iterator[None]:  # type: ignore[no-untyped-def]
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_step_is_vicos(host: DiffusersHost, example: Example, short: EMSettings) -> None:
    """Both streams one after the other, written out: clean reference, Otsu's mask of its own attention,
    raw keys behind the whole text block, the plain loss, and the regulariser in float64."""
    em, visual = vico(short, visual_settings("sd-64"), batch=2)
    parts = parts_of(prepare(host, [one(example)], em, None, visual))
    found = terms_of(parts, visual)
    problem, state, drawn, look, values = parts
    (name,), places = problem.pictures[0].names, places_of(problem)
    conditioning = host.encode_prompts([problem.pictures[0].example.prompt] * 2, state.vectors)
    column, end = conditioning.streams["text"].columns[0][name], conditioning.streams["text"].end[0]
    features, probabilities, caught = {}, {}, {}

    def catch(key):  # type: ignore[no-untyped-def]
        return lambda module, args, out: caught.__setitem__(key, out.detach())

    with torch.no_grad():
        for place in places:
            attention = host.unet.get_submodule(place.name)
            with (
                hooked(host.unet.get_submodule(place.block), catch("x")),
                hooked(attention.to_q, catch("q")),
                hooked(attention.to_k, catch("k")),
            ):
                host.predict(problem.pictures[0].Z0.expand(2, -1, -1, -1), drawn.t, conditioning)
            split = [caught[key].double().unflatten(-1, (place.heads, -1)) for key in "qk"]
            logits = torch.einsum("bqhd,bthd->bhqt", *split) / split[0].shape[-1] ** 0.5
            features[place.name] = caught["x"]
            probabilities[place.name] = logits.softmax(-1).mean(dim=1)
        regular = 0.0
        for p in probabilities.values():
            a, e = p[..., list(column)].mean(-1), p[..., end]
            a, e = (x / x.amax(dim=1, keepdim=True) for x in (a, e))
            regular += (a - e).square().mean().item()
        blocks = blocks_of(values, places)

        def plain(number):  # type: ignore[no-untyped-def]
            place = places[number]
            block = PlainBlock(place.channels, place.heads)
            for key, value in block.values().items():
                value.copy_(blocks[name][place.name][key])
            maps = probabilities[place.name][..., list(column)].mean(-1)
            seen = torch.tensor([brute_force(row.float().tolist()) for row in maps])
            return lambda module, args, out: block(out, features[place.name], seen)

        hooks = [
            host.unet.get_submodule(place.block).register_forward_hook(plain(number))
            for number, place in enumerate(places)
        ]
        Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
        prediction = host.predict(Z_t, drawn.t, conditioning)
        for handle in hooks:
            handle.remove()
    expected = (prediction - drawn.eps).square().mean()
    torch.testing.assert_close(found["diffusion"], expected, atol=2e-5, rtol=2e-5)
    assert found["end_of_text"].item() == pytest.approx(regular, rel=1e-4)
    assert found["total"].item() == pytest.approx(float(expected) + 5e-4 * regular, rel=1e-4)
    for value in values.values():
        assert value.grad is not None and value.grad.any()
    assert state.vectors[name]["clip_l"].grad.any()
    assert look.source == {name: 0}


@pytest.mark.parametrize("kind", ["em", "otsu"])
def test_the_reference_may_come_before(
    host: DiffusersHost, example: Example, brief: EMSettings, visual: VisualSettings, kind: str
) -> None:
    """Without its gradient the reference's pass comes first; the loss and the blocks' gradients are the
    same, but the token misses a part of its own."""
    grads = []
    for joined in (True, False):
        settings = replace(
            visual, token_learning_rate=1e-3, key_masks=kind, reference_gradient=joined
        )
        parts = parts_of(prepare(host, [example], brief, None, settings))
        terms = terms_of(parts, settings)
        tokens = [v.grad for of in parts[1].vectors.values() for v in of.values()]
        grads.append((terms["diffusion"].detach(), [v.grad for v in parts[4].values()], tokens))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-5, rtol=1e-3)
    assert not torch.allclose(grads[0][2][0], grads[1][2][0], rtol=1e-2)


def test_any_batch_size(
    host: DiffusersHost, example: Example, brief: EMSettings, visual: VisualSettings
) -> None:
    """A batch of four has the mean of its samples' own losses, whatever concepts they name."""
    settings = replace(visual, batch=4, key_masks="otsu")
    problem, state, drawn, look, values = parts_of(prepare(host, [example], brief, None, settings))
    assert len(set(drawn.subsets)) > 1
    together = terms_of((problem, state, drawn, look, values), settings)
    alone = []
    for i in range(4):
        part = replace(
            drawn,
            subsets=drawn.subsets[i : i + 1],
            prompts=drawn.prompts[i : i + 1],
            **{n: getattr(drawn, n)[i : i + 1] for n in ("present", "t", "eps", "Z0", "masks")},
        )
        present = {n: p[i : i + 1] for n, p in look.present.items() if n in drawn.subsets[i]}
        seen = Look(look.views, look.source, present)
        alone.append(terms_of((problem, state, part, seen, values), settings)["diffusion"].detach())
    torch.testing.assert_close(together["diffusion"].detach(), torch.stack(alone).mean())


def test_a_new_condition_changes_nothing(
    host: DiffusersHost, example: Example, brief: EMSettings, visual: VisualSettings
) -> None:
    """With outputs of zeros the prediction is the model's own, bit for bit; no hook stays."""
    problem, state, drawn, look, _ = parts_of(prepare(host, [example], brief, None, visual))
    zeros = init_blocks(
        places_of(problem), [c.name for c in problem.concepts], torch.Generator(), True
    )
    own = dict(problem.host.unet.named_modules())
    before = {n: len(m._forward_hooks) for n, m in own.items()}
    found = terms_of((problem, state, drawn, look, zeros), visual)["diffusion"]
    from em_core.method.m_step import condition, diffusion_term

    Z_t = host.schedule.add_noise(drawn.Z0, drawn.eps, drawn.t)
    plain = host.predict(Z_t, drawn.t, condition(problem, state, drawn))
    weight = torch.ones(len(drawn.t))
    expected = diffusion_term(problem.settings, drawn, plain, drawn.eps, weight)
    assert torch.equal(found, expected)
    assert {n: len(m._forward_hooks) for n, m in own.items()} == before


def test_the_regulariser_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    maps = {n: torch.rand(4, 3, 5, 6, generator=g, dtype=torch.float64) for n in ("a", "b")}
    from em_core.model.visual import Place

    places = [Place(n, (5, 6), 8, 1) for n in maps]
    present = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = 0.0
    for A in maps.values():
        for row in range(4):
            end = A[row, 2] / A[row, 2].max()
            for k in range(2):
                if present[row % 2, k]:
                    expected += (A[row, k] / A[row, k].max() - end).square().mean().item() / 4
    assert float(regulariser(maps, places, present)) == pytest.approx(expected, rel=1e-12)


def test_stopped_and_resumed(
    host: DiffusersHost,
    example: Example,
    brief: EMSettings,
    visual: VisualSettings,
    tmp_path: Path,
) -> None:
    """Bit for bit as never stopped; the model's weights are what they were, and so is its gradient."""
    settings = replace(visual, token_learning_rate=1e-3, end_of_text_weight=5e-4)
    problem = prepare(host, [example], brief, None, settings)
    before = {n: w.clone() for n, w in host.named_weights().items()}
    whole = run(problem, initialise(problem))
    assert finished(problem, whole) and whole.phase == "visual"
    file = StateFile(tmp_path / "state.safetensors", "key")
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count == 5  # the start, two steps of the EM loop, two of the visual phase

    stopped = run(problem, initialise(problem), file=file, stop=stop)
    assert (stopped.phase, stopped.step) == ("visual", 2) and not finished(problem, stopped)
    again = run(problem, file.load(host.device))
    assert differences(whole, again) == []
    assert all(torch.equal(w, before[n]) for n, w in host.named_weights().items())
    assert not any(w.requires_grad or w.grad is not None for w in host.named_weights().values())


def test_learning_from_concepts(
    host: DiffusersHost, example: Example, brief: EMSettings, visual: VisualSettings, tmp_path: Path
) -> None:
    """Concepts that are known need no EM loop; a LoRA of theirs acts and is kept; a finished run is
    found again, by other concepts it is not."""
    joint = JointSettings("lora", steps=2, learning_rate=0.05)
    known = learn_concepts(host, [example], brief, joint)
    phases, store, visual = [], RunStore(tmp_path), replace(visual, steps=2)
    given = replace(known, concepts=known.concepts)
    found = learn_visual(
        host, [example], brief, visual, given, store=store,
        listeners=[lambda event, state: phases.append((event.phase, event.losses.get("total")))],
    )  # fmt: skip
    assert [phase for phase, _ in phases] == ["start", "visual", "visual"]
    assert differences(found.concepts.vectors, known.vectors) == []
    assert differences(found.concepts.weights, known.weights) == []
    without = []
    learn_visual(
        host, [example], brief, visual, replace(known, weights={}), store=store,
        listeners=[lambda event, state: without.append(event.losses.get("total"))],
    )  # fmt: skip
    assert without[1] != phases[1][1]
    again = learn_visual(host, [example], brief, visual, given, store=store)
    assert differences(again, found) == []
    assert isinstance(again, VisualCondition) and isinstance(again.concepts, ConceptSet)


def test_references_are_other_pictures(host: DiffusersHost, brief: EMSettings) -> None:
    """The concept in common looks at the other picture, the companions at views of their own."""
    examples = [example_of(picture) for picture in concept_scene(2, "H").pictures]
    shared = set(examples[0].prompt.names) & set(examples[1].prompt.names)
    problem = prepare(host, examples, brief, None, VisualSettings())
    state = initialise(problem)
    references = References(problem, state.pictures, [p.names for p in problem.pictures])
    generator = torch.Generator().manual_seed(0)
    for index, example in enumerate(examples):
        for name in example.prompt.names:
            picked = {references.choose(index, name, generator)[0] for _ in range(5)}
            assert picked == ({1 - index} if name in shared else {index})


def test_views_are_moved_with_their_masks(host: DiffusersHost, example: Example) -> None:
    """A mask moves as its picture does, most of it stays, and views are the same every time."""
    names = list(example.truth)
    masks = torch.stack([example.truth[name].float() for name in names])
    generator = torch.Generator().manual_seed(0)
    moves = [draw_move(masks, (64, 64), generator) for _ in range(30)]
    assert len(set(moves)) > 20 and {move.mirrored for move in moves} == {True, False}
    for move in moves:
        again = moved(masks, (64, 64), move, "zeros")
        assert (again.sum((1, 2)) >= KEPT * move.zoom**2 * masks.sum((1, 2)) * 0.98).all()
        as_picture = moved(masks, (64, 64), move, "reflection")
        assert (as_picture >= again - 1e-6).all()
    flipped = moved(masks, (64, 64), Move(mirrored=True), "zeros")
    torch.testing.assert_close(flipped, masks.flip(-1), atol=1e-4, rtol=0)
    shifted = moved(masks, (64, 64), Move(x=0.25), "zeros")
    torch.testing.assert_close(shifted[..., 8:], masks[..., :-8], atol=1e-4, rtol=0)
    larger = moved(masks, (64, 64), Move(zoom=2.0), "zeros")
    close = torch.nn.functional.interpolate(
        masks[:, None, 16:48, 16:48], scale_factor=2, mode="nearest"
    )
    assert (larger - close[:, 0]).abs().mean() < 0.03


def test_phases_that_exclude_each_other(
    host: DiffusersHost, example: Example, brief: EMSettings, visual: VisualSettings
) -> None:
    with pytest.raises(UserError, match="joint phase 'lora'"):
        prepare(host, [example], brief, JointSettings("lora"), visual)
    with pytest.raises(UserError, match="of one concept"):
        prepare(host, [example], brief, None, replace(visual, gated=False))
    with pytest.raises(UserError, match="no places for image attention"):
        learn_visual(ToyHost(), [example], brief, visual)  # type: ignore[arg-type]
    for wrong in (
        {"steps": 0},
        {"learning_rate": 2.0},
        {"end_of_text_weight": -1.0},
    ):
        with pytest.raises(UserError, match="Expected"):
            VisualSettings(**wrong)  # type: ignore[arg-type]


def test_generators_are_left_alone(
    host: DiffusersHost, example: Example, brief: EMSettings
) -> None:
    """Drawing references takes no numbers from anywhere but the run's own generator."""
    state = torch.random.get_rng_state()
    problem = prepare(host, [example], brief, None, VisualSettings(batch=2))
    parts = parts_of(problem)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generator_at(parts[1].generator).get_state().equal(parts[1].generator)


def test_noise_is_on_disturbed_references_alone(
    host: DiffusersHost, example: Example, brief: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture that looks at itself sees noise of the given strength; another one looks at it as it is."""
    pale = replace(example, picture=0.4 + 0.2 * example.picture)
    seen: list[torch.Tensor] = []

    def encode(host: DiffusersHost, picture: torch.Tensor) -> torch.Tensor:
        seen.append(picture)
        return host.encode_image(picture[None] * 2 - 1)

    monkeypatch.setattr("em_core.method.references.encode", encode)
    for itself in (True, False):
        views = []
        for noise in (0.0, 0.05):
            problem = prepare(host, [pale], brief, None, VisualSettings(reference_noise=noise))
            state = initialise(replace(problem, settings=replace(brief, mode="none")))
            references = References(problem, state.pictures, [p.names for p in problem.pictures])
            seen.clear()
            references.view((0, 0), (64, 64), itself)
            views.append(torch.stack(seen))
        noises = views[1] - views[0]
        assert noises.std().item() == pytest.approx(0.05 if itself else 0.0, rel=0.05)
