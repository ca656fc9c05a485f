"""Whole runs: that a stop changes nothing, what is kept of them, and the library's own door to them."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import differences
from safetensors.torch import load_file
from whole_runs import JOINT, finish

from em_core import (
    ConceptSet,
    DiffusersHost,
    EMSettings,
    Example,
    JointSettings,
    RunStore,
    TrainingError,
    UserError,
    em_settings,
    find_masks,
    learn_concepts,
    learning,
    refine_masks,
)
from em_core.files import read_tensors, write_tensors
from em_core.masks.crf import DEMO, LOCAL_COLOUR, MaskRefiner, labels
from em_core.masks.resizing import cut, resize
from em_core.method import e_step
from em_core.method.loop import StepEvent, learn
from em_core.method.problem import prepare, prepare_picture
from em_core.method.start import FirstMasks, initialise, known_vectors, masks_of_vectors
from em_core.method.state import RunState
from em_core.model.adapters import init_lora
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import conclude
from em_core.runs.key import run_key
from em_core.runs.runner import finished, run
from em_core.runs.state_file import KIND, StateFile


def same(a: ConceptSet, b: ConceptSet) -> bool:
    """Tokens, weights, masks and curves equal bit for bit."""
    names = ("vectors", "weights", "masks", "curves")
    return not any(differences(getattr(a, n), getattr(b, n)) for n in names)


def after(step: int) -> Callable[[], bool]:
    """A request to stop after so many steps, the first masks not counted."""
    asked = iter(range(1000))
    return lambda: next(asked) == step


class Broken(Exception):
    """What goes wrong on purpose."""


def broken(*_: object, **__: object) -> torch.Tensor:
    raise Broken


class Failing:
    """A function that works so many times, and then fails."""

    def __init__(self, honest: Callable, times: int) -> None:
        self.honest, self.left = honest, times

    def __call__(self, *args: object, **options: object) -> Any:
        self.left -= 1
        return broken() if self.left < 0 else self.honest(*args, **options)


class Counted:
    """A function that counts its calls."""

    def __init__(self, honest: Callable) -> None:
        self.honest, self.calls = honest, 0

    def __call__(self, *args: object, **options: object) -> Any:
        self.calls += 1
        return self.honest(*args, **options)


# Stopping and going on


@pytest.mark.parametrize("kind", ["none", "lora", "cross_attention", "full"])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, kind: str
) -> None:
    problem = prepare(host, [example], short, replace(JOINT, kind=kind))
    sample = host.identity().sample.clone()
    start = initialise(problem)
    end = run(problem, start)
    last = short.steps + (0 if kind == "none" else JOINT.steps)
    for step in {1, 4, 6, short.steps, last - 1} - {last}:
        file = StateFile(tmp_path / f"{step}.safetensors", "key")
        state = run(problem, start, file=file, stop=after(step))
        assert not finished(problem, state)
        again = run(problem, file.load(host.device))
        assert finished(problem, again)
        assert not differences(again, end), f"stopped at {step}"
        assert same(conclude(problem, again), conclude(problem, end))
        assert torch.equal(host.identity().sample, sample)


def test_a_stop_at_the_last_step_is_the_end(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    problem = prepare(host, [example], replace(short, steps=2))
    file, start = StateFile(tmp_path / "s.safetensors", "key"), initialise(problem)
    state = run(problem, start, file=file, stop=after(2))
    assert finished(problem, state) and not differences(state, run(problem, start))


def test_a_state_saved_right_after_resuming_keeps_the_moments(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    """The joint phase builds its optimizer late; until then what was loaded must not be lost."""
    problem = prepare(host, [example], short, replace(JOINT, kind="lora"))
    files = [StateFile(tmp_path / f"{name}.safetensors", "key") for name in ("s", "again")]
    run(problem, initialise(problem), file=files[0], stop=after(short.steps + 2))
    files[1].save(files[0].load(host.device))
    kept, again = (load_file(file.path) for file in files)
    assert any(n.startswith("state/moments/") for n in kept)
    assert kept.keys() == again.keys() and all(torch.equal(kept[n], again[n]) for n in kept)


def test_the_end_of_the_em_phase_is_on_disk_before_the_joint_phase(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    """Even where nothing can be saved any more once the joint phase has begun."""
    problem = prepare(host, [example], short, replace(JOINT, kind="lora", prior_weight=1.0))
    file, saved = StateFile(tmp_path / "s.safetensors", "key"), []

    def fail(*_: object) -> torch.Tensor:
        saved.append(file.load(host.device))
        raise RuntimeError("drawing the prior failed")

    monkeypatch.setattr(host, "draw", fail)
    with pytest.raises(RuntimeError, match="drawing"):
        run(problem, initialise(problem), file=file)
    for kept in (saved[0], file.load(host.device)):
        assert (kept.phase, kept.step, finished(problem, kept)) == ("em", short.steps, False)


def test_same_seed_same_result_other_seed_another(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    short = replace(short, steps=4)
    results = [finish(prepare(host, [example], replace(short, seed=s)))[1] for s in (1, 1, 2)]
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_attention_that_is_not_finite_is_never_taken_over(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    """What is on disk afterwards can still be resumed."""
    problem = prepare(host, [example], short)
    file = StateFile(tmp_path / "s.safetensors", "key")
    state = run(problem, initialise(problem), file=file, stop=after(2))
    weight = host.unet.get_parameter(
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    )
    before = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(TrainingError, match="not finite"):
            run(problem, state, file=file)
        with pytest.raises(TrainingError, match="attention is not finite"):
            initialise(problem)
    finally:
        weight.data.copy_(before)
    assert file.load(host.device).step == 2


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    """The last good state is on disk, also where the run went on from a state in memory."""
    problem = prepare(host, [example], short)
    file = StateFile(tmp_path / "s.safetensors", "key")
    left = learn(problem, initialise(problem))
    state = [next(left)[1] for _ in range(4)][-1]
    held = {c: of["clip_l"].clone() for c, of in state.vectors.items()}
    honest = host.predict
    monkeypatch.setattr(host, "predict", lambda *a: honest(*a) * float("nan"))
    with pytest.raises(TrainingError, match="not finite at step 4"):
        run(problem, state, file=file)
    assert all(torch.equal(held[c], of["clip_l"]) for c, of in state.vectors.items())
    monkeypatch.undo()
    again = file.load(host.device)
    assert again.step == 3
    assert all(torch.equal(held[c], of["clip_l"]) for c, of in again.vectors.items())


@pytest.mark.parametrize(
    ("kind", "what", "passed", "step"),
    [
        # A pass a step and one more in the first; E-steps at 4, 8 and 12 read what these have seen.
        # All weights take a pass of the untouched model a step, which comes first.
        ("none", "predict", 6, ("em", 5)),
        ("none", "E-step", 1, ("em", 7)),
        ("lora", "predict", 15, ("joint", 2)),
        ("full", "predict", 17, ("joint", 2)),
        ("full", "predict", 18, ("joint", 2)),
        ("cross_attention", "encode_prompts", 15, ("joint", 2)),
    ],
)
def test_a_step_that_fails_did_not_happen(
    host: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path, monkeypatch,
    kind: str, what: str, passed: int, step: tuple[str, int],
) -> None:  # fmt: skip
    """The state before it goes on to the very end of a run that nothing disturbed.

    What fails is a call of the host, or the E-step after an M-step that went well.
    """
    problem = prepare(host, [example], replace(short, refresh=0), replace(JOINT, kind=kind))
    start, file = initialise(problem), StateFile(tmp_path / "s.safetensors", "key")
    whole = run(problem, start)
    weights = {name: p.clone() for name, p in host.weights("full").items()}
    seen: list[RunState] = []
    with monkeypatch.context() as patch:
        if what == "E-step":
            patch.setattr(e_step, "masks_among", Failing(e_step.masks_among, passed))
        else:
            patch.setattr(host, what, Failing(getattr(host, what), passed))
        with pytest.raises(Broken):
            run(problem, start, [lambda event, state: seen.append(state)], file)
    assert (seen[-1].phase, seen[-1].step) == step
    assert not differences(file.load(host.device), seen[-1])
    assert not differences(host.weights("full"), weights)
    again = run(problem, seen[-1])
    assert not differences(again, whole)
    assert not differences(run(problem, file.load(host.device)), whole)
    if kind == "none":  # each of its states is a value, the first one too
        assert not differences(run(problem, start), whole)


# Files of states


def varied(value: Any, g: torch.Generator) -> Any:
    """The value with other numbers in each tensor, so that none could be mistaken for another."""
    if isinstance(value, torch.Tensor):
        drawn = torch.rand(value.shape, generator=g)
        return drawn > 0.5 if value.dtype == torch.bool else (200 * drawn).to(value.dtype)
    if is_dataclass(value):
        of = {f.name: varied(getattr(value, f.name), g) for f in fields(value)}
        return replace(value, **of)
    if isinstance(value, Mapping):
        return {name: varied(x, g) for name, x in value.items()}
    return tuple(varied(x, g) for x in value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def late(host: DiffusersHost, example: Example) -> RunState:
    """A state of the joint phase, every field of which has something in it."""
    settings = replace(em_settings("sd-64"), steps=1, batch=1)
    problem = prepare(host, [example], settings, replace(JOINT, kind="lora"))
    state = run(problem, initialise(problem), stop=after(3))
    told = tuple(replace(p, told=torch.zeros_like(p.named)) for p in state.pictures)
    return varied(replace(state, pictures=told), torch.Generator().manual_seed(0))


def test_every_field_of_a_state_survives_its_file(late: RunState, tmp_path: Path) -> None:
    """Fields that are added later too: they are all asked for by name, and none may be at its default."""
    for f in fields(RunState):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = getattr(late, f.name)
        assert isinstance(value, torch.Tensor) or value != default, f"{f.name} shows nothing"
    file = StateFile(tmp_path / "s.safetensors", "key")
    file.save(late)
    assert not differences(file.load(torch.device("cpu")), late)
    changed = replace(late, pictures=(varied(late.pictures[0], torch.Generator().manual_seed(1)),))
    assert len(differences(changed, late)) == len(fields(late.pictures[0]))


def test_a_state_belongs_to_its_run(
    host: DiffusersHost, example: Example, short: EMSettings, late: RunState, tmp_path: Path
) -> None:
    file, key = tmp_path / "s.safetensors", run_key("model", [example], short, JOINT)
    StateFile(file, key).save(late)
    other = run_key("model", [example], replace(short, learning_rate=1e-3), JOINT)
    with pytest.raises(UserError, match="belongs to a run with other"):
        StateFile(file, other).load(host.device)


def rewrite(file: Path, change: Callable[[dict, dict], None], kind: str = KIND) -> None:
    """Write a state file again with its tensors and its JSON changed."""
    tensors, plain = read_tensors(file, KIND)
    change(tensors, plain)
    write_tensors(file, tensors, kind, plain)


def without(name: str) -> Callable[[dict, dict], None]:
    return lambda tensors, plain: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("state/generator"), "does not hold the whole state"),
        (without("state/pictures/0/pending"), "does not hold the whole state"),
        (lambda tensors, plain: plain["state"].pop("vectors"), "does not hold the whole state"),
        (lambda tensors, plain: plain["state"].update(new=1), "does not hold the whole state"),
        (
            lambda tensors, plain: plain["state"]["pictures"][0].pop("found"),
            "does not hold the whole state",
        ),
        (lambda tensors, plain: plain.pop("state"), "does not hold the whole state"),
        (lambda tensors, plain: plain.pop("key"), "belongs to a run with other"),
    ],
)
def test_a_state_that_is_not_whole(late: RunState, tmp_path: Path, change, says: str) -> None:
    file = StateFile(tmp_path / "s.safetensors", "key")
    file.save(late)
    rewrite(file.path, change)
    with pytest.raises(UserError, match=says):
        file.load(torch.device("cpu"))


def test_a_state_of_another_version(late: RunState, tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.safetensors", "key")
    file.save(late)
    rewrite(file.path, lambda tensors, plain: None, "visual-concepts run state 2")
    with pytest.raises(
        UserError, match=r"run state file of another version .* \(format 2, not 5\)"
    ):
        file.load(torch.device("cpu"))


def test_a_file_of_no_state_can_be_removed(late: RunState, tmp_path: Path) -> None:
    file = StateFile(tmp_path / "s.safetensors", "key")
    file.remove()
    assert not file.exists()
    file.save(late)
    assert file.exists()
    file.remove()
    assert not list(tmp_path.iterdir())


# The library's door


@pytest.fixture
def brief(short: EMSettings) -> EMSettings:
    return replace(short, steps=6, e_step_every=3, masks=replace(short.masks, init_timesteps=8))


def test_learning_gives_the_events_and_concepts_of_learn_concepts(
    host: DiffusersHost, example: Example, brief: EMSettings
) -> None:
    joint = replace(JOINT, kind="lora", steps=2)
    told: list[StepEvent] = []
    listeners = [lambda event, state: told.append(event)]
    concepts = learn_concepts(host, [example], brief, joint, listeners=listeners)
    one_by_one = learning(host, [example], brief, joint)
    events = list(one_by_one)
    assert not differences(events, told)
    steps = [("start", 0), *(("em", i) for i in range(1, 7)), ("joint", 1), ("joint", 2)]
    assert [(e.phase, e.step) for e in events] == steps
    assert not differences(one_by_one.concepts(), concepts)


def test_concepts_of_a_run_that_has_not_ended(
    host: DiffusersHost, example: Example, brief: EMSettings
) -> None:
    """In the middle of the joint phase: what the run has learned by then, and the model as it was."""
    joint = replace(JOINT, kind="full", steps=3)
    weights = {name: p.clone() for name, p in host.weights("full").items()}
    begun = learning(host, [example], brief, joint)
    for _ in range(1 + 6 + 2):
        event = next(begun)
    assert (event.phase, event.step) == ("joint", 2)
    found = begun.concepts()
    assert not differences(host.weights("full"), weights)
    assert list(begun) == []
    problem = prepare(host, [example], brief, joint)
    expected = conclude(problem, run(problem, initialise(problem), stop=after(6 + 2)))
    assert not differences(found, expected)
    assert found.weights and [step for step, _ in found.curves["joint_loss/total"]] == [1, 2]


def test_defaults_are_those_of_the_models_family(host: DiffusersHost, example: Example) -> None:
    assert learning(host, [example]).problem.settings == em_settings("sd-64")
    assert learning(host, [example]).problem.joint == JointSettings()


def test_a_finished_run_is_found_again_without_the_model(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, monkeypatch
) -> None:
    store = RunStore(tmp_path)
    concepts = learn_concepts(host, [example], brief, store=store)
    assert [f.name.partition(".")[2] for f in tmp_path.iterdir()] == ["concepts.safetensors"]
    counted = {name: Counted(getattr(host, name)) for name in ("predict", "encode_image")}
    for name, count in counted.items():
        monkeypatch.setattr(host, name, count)
    heard: list[StepEvent] = []
    listeners = [lambda event, state: heard.append(event)]
    again = learn_concepts(host, [example], brief, store=store, listeners=listeners)
    assert same(again, concepts) and not heard
    assert not any(count.calls for count in counted.values())
    learn_concepts(host, [example], replace(brief, seed=9), store=store)
    assert all(count.calls for count in counted.values())


def test_a_run_in_a_store_is_the_same_as_without(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    """A listener that fails ends the run; the next call goes on after the step that it saw."""
    joint = replace(JOINT, kind="lora")
    whole = learn_concepts(host, [example], brief, joint)
    store = RunStore(tmp_path)
    for fails_at, goes_on_at in (
        (("em", 4), None),
        (("joint", 2), ("em", 5)),
        (None, ("joint", 3)),
    ):
        heard: list[tuple[str, int]] = []

        def listen(event: StepEvent, state: RunState, heard=heard, fails_at=fails_at) -> None:
            heard.append((event.phase, event.step))
            if heard[-1] == fails_at:
                raise Broken

        if fails_at:
            with pytest.raises(Broken):
                learn_concepts(host, [example], brief, joint, store=store, listeners=[listen])
            assert [f.name.partition(".")[2] for f in tmp_path.iterdir()] == ["state.safetensors"]
        else:
            found = learn_concepts(host, [example], brief, joint, store=store, listeners=[listen])
        assert goes_on_at is None or heard[0] == goes_on_at
    assert same(found, whole)
    assert [f.name.partition(".")[2] for f in tmp_path.iterdir()] == ["concepts.safetensors"]


def test_damaged_files_in_a_store_count_as_none(
    host: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path
) -> None:
    brief, store = replace(brief, steps=2), RunStore(tmp_path)
    whole = learn_concepts(host, [example], brief)
    store.state("key").path.write_bytes(b"damaged")
    assert same(learn_concepts(host, [example], brief, store=store, key="key"), whole)
    store.result_file("key").write_bytes(b"damaged")
    assert same(learn_concepts(host, [example], brief, store=store, key="key"), whole)


# Masks without learning


def learned(host: DiffusersHost) -> ConceptSet:
    """A concept <rex> with a LoRA that acts."""
    g = torch.Generator().manual_seed(0)
    lora = {n: x.detach() for n, x in init_lora(host.adaptable_layers(), 2, g).items()}
    lora = {n: x + 0.3 * n.endswith(".lora_up") for n, x in lora.items()}
    vectors = {"rex": host.initial_vectors("star", 1, g)}
    concepts = ConceptPrompt.parse("<rex:star>").concepts
    return ConceptSet(concepts, vectors, host.identity(), lora, lora_scale=0.5)


def test_found_masks_are_read_off_the_attention(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """Of a learned concept and of words, at the picture's own size, with the weights acting."""
    settings = replace(short.masks, init_timesteps=6)
    concepts, text = learned(host), "a photo of <rex> and <doll:circle> on grass"
    picture = example.picture[:, :40]
    weights = {name: p.clone() for name, p in host.weights("full").items()}
    found, again, other = (
        find_masks(host, picture, text, concepts, settings, seed) for seed in (5, 5, 6)
    )
    assert not differences(found, again) and not torch.equal(found.maps, other.maps)
    assert not differences(host.weights("full"), weights)
    assert not any(m._forward_hooks for _, part in host.modules() for m in part.modules())

    prompt = ConceptPrompt.parse(text)
    prepared = prepare_picture(host, Example(picture, prompt), settings)
    assert prepared.size == (48, 80)
    vectors = known_vectors(host, prompt, concepts.vectors)
    assert torch.equal(
        vectors["doll"]["clip_l"], host.initial_vectors("circle", None, torch.Generator())["clip_l"]
    )

    def by_hand() -> FirstMasks:
        g = torch.Generator().manual_seed(5)
        return masks_of_vectors(host, prepared, vectors, settings, (), g)

    with host.applied(concepts.weights, concepts.lora_scale):
        expected = by_hand()
    assert found.names == ("rex", "doll") and torch.equal(found.maps, expected.maps)
    assert torch.equal(found.masks, cut(resize(expected.estimate.masks.float(), (40, 64), "mask")))
    assert not torch.equal(by_hand().maps, expected.maps), "the LoRA does not act"


def test_masks_of_what_nobody_knows(host: DiffusersHost, example: Example) -> None:
    with pytest.raises(UserError, match="Nothing is known of <max>"):
        find_masks(host, example.picture, "a photo of <max>", learned(host))
    with pytest.raises(UserError, match="No concept in the prompt"):
        find_masks(host, example.picture, "a photo of a star")


@pytest.mark.parametrize("joint", [True, False])
def test_refined_masks_are_the_labels_of_the_crf(example: Example, joint: bool) -> None:
    """Masks of any size; they overlap only where each is refined alone."""
    settings = replace(DEMO, joint=joint)
    masks = resize(torch.stack(list(example.truth.values())).float(), (24, 32), "mask")
    found = refine_masks(example.picture, masks, settings)
    expected = labels(MaskRefiner(example.picture, settings)(masks), joint)
    assert torch.equal(found, expected) and found.shape == (2, 64, 64)
    both = torch.stack([masks[0], masks[0]])
    overlap = refine_masks(example.picture, both, settings).all(dim=0)
    assert bool(overlap.any()) != joint


def test_refining_is_by_local_colour_unless_asked_otherwise(example: Example) -> None:
    masks = torch.stack(list(example.truth.values()))
    found = refine_masks(example.picture, masks)
    assert torch.equal(found, refine_masks(example.picture, masks, LOCAL_COLOUR))
