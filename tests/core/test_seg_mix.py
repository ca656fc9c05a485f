"""Seg-Mix, and learning rates that fall: against a picture put together by hand, and closed forms."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equality import differences
from whole_runs import JOINT

from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method import seg_mix
from em_core.method.joint import learn_joint
from em_core.method.m_step import draw, m_step
from em_core.method.optimizer import rate_factor
from em_core.method.problem import Problem, prepare
from em_core.method.seg_mix import free_place, make_mixes, put_together
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.runs.runner import run
from em_core.runs.state_file import StateFile
from em_core.settings import EMSettings

MIXED = replace(JOINT, kind="lora", seg_mix=1.0, seg_mix_pictures=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A picture in which every pixel has a value of its own, and two masks on it."""
    image = torch.arange(3 * 24 * 20, dtype=torch.float32).reshape(3, 24, 20) / (3 * 24 * 20)
    labels = torch.zeros(2, 24, 20, dtype=torch.bool)
    labels[0, 2:8, 3:7] = True
    labels[0, 2, 3] = False
    labels[1, 12:20, 10:18] = True
    return image, labels


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("flip", [False, True])
def test_subjects_are_moved_whole(monkeypatch: pytest.MonkeyPatch, seed: int, flip: bool) -> None:
    """At their own size every pixel of a subject comes from it, by one shift, perhaps mirrored."""
    monkeypatch.setattr(seg_mix, "SCALES", (1.0, 1.0))
    image, labels = scene()
    mixed, masks = put_together(image, labels, [1, 0], seeded(seed), flip)
    assert not (masks[0] & masks[1]).any()
    rest = image[:, ~labels.any(dim=0)].mean(dim=1)
    assert torch.allclose(mixed[:, ~masks.any(dim=0)], rest[:, None])
    assert int(masks[0].sum()) == int(labels[0].sum())  # the last one hides, and is not hidden
    for mask, label in zip(masks, labels, strict=True):
        source = {tuple(image[:, r, c].tolist()): (r, c) for r, c in label.nonzero().tolist()}
        places = [
            (r, c, *source[tuple(mixed[:, r, c].tolist())]) for r, c in mask.nonzero().tolist()
        ]
        assert len({r - from_r for r, _, from_r, _ in places}) == 1
        straight = {c - from_c for _, c, _, from_c in places}
        mirrored = {c + from_c for _, c, _, from_c in places}
        assert len(straight) == 1 or (flip and len(mirrored) == 1)


def test_sizes_stay_within_their_bounds() -> None:
    image, labels = scene()
    low, high = seg_mix.SCALES
    for seed in range(20):
        _, masks = put_together(image, labels, [0, 1], seeded(seed))
        rows, columns = masks[1].any(dim=1).sum(), masks[1].any(dim=0).sum()
        assert round(8 * low) <= int(rows) <= round(8 * high)
        assert round(8 * low) <= int(columns) <= round(8 * high)


def test_a_background_stays_where_it_is() -> None:
    image, labels = scene()
    ground = ~labels.any(dim=0)
    mixed, masks = put_together(image, torch.stack([labels[0], ground]), [0, 1], seeded())
    assert torch.equal(masks[1], ground & ~masks[0])
    assert torch.equal(mixed[:, masks[1]], image[:, masks[1]])


@pytest.mark.parametrize("seed", range(5))
def test_a_subject_goes_where_it_hides_least(seed: int) -> None:
    taken = torch.rand(12, 10, generator=seeded(seed)) < 0.4
    mask = torch.rand(4, 3, generator=seeded(seed + 100)) < 0.8
    g = seeded(seed)
    drawn = [
        (int(torch.randint(9, (), generator=g)), int(torch.randint(8, (), generator=g)))
        for _ in range(seg_mix.TRIES)
    ]
    hidden = {
        (top, left): sum(
            int(mask[r, c] and taken[top + r, left + c]) for r in range(4) for c in range(3)
        )
        for top, left in drawn
    }
    top, left = free_place(taken, mask, seeded(seed))
    assert hidden[top, left] == min(hidden.values())


@pytest.fixture
def problem(host: DiffusersHost, example: Example, short: EMSettings) -> Problem:
    given = replace(example, masks=dict(example.truth))
    settings = replace(short, mode="given", decay_after=2)
    return prepare(host, [given], settings, replace(MIXED, decay_after=2))


def test_what_is_drawn_is_a_mix(problem: Problem) -> None:
    """Latents, masks and prompts of one mix go together; masks that are seen are those present."""
    mixes = make_mixes(problem, initialise(problem))
    assert mixes is not None
    drawn = draw(problem, initialise(problem), seeded(), mixes)
    for Z0, masks, names, prompt in zip(
        drawn.Z0, drawn.masks, drawn.subsets, drawn.prompts, strict=True
    ):
        (mix,) = [mix for mix in mixes[0] if torch.equal(mix.Z0[0], Z0)]
        assert torch.equal(mix.masks, masks) and mix.names == names == prompt.names
        there = {n for n, m in zip(problem.pictures[0].names, masks, strict=True) if m.any()}
        assert there == set(names)


def test_a_share_of_none_changes_nothing(problem: Problem) -> None:
    off = replace(problem, joint=replace(problem.joint, seg_mix=0.0))
    assert make_mixes(off, initialise(off)) is None


def test_without_masks_there_is_nothing_to_cut_out(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    with pytest.raises(UserError, match="mode none has no masks"):
        prepare(host, [example], replace(short, mode="none"), MIXED)


def test_a_stopped_run_has_the_mixes_and_rates_that_it_had(
    problem: Problem, tmp_path: Path
) -> None:
    start = initialise(problem)
    end = run(problem, start)
    last = problem.settings.steps
    for step in (3, last + 1, last + 2):
        asked = iter(range(1000))
        file = StateFile(tmp_path / f"{step}.safetensors", "key")
        run(problem, start, file=file, stop=lambda asked=asked, step=step: next(asked) == step)
        assert not differences(run(problem, file.load(problem.host.device)), end)


# Rates that fall


def test_however_many_steps_their_rates_are_bounded() -> None:
    """Full for the first n, then (n / step)^2: all of them together less than 2 n."""
    assert [rate_factor(step, 2) for step in range(4)] == [1, 1, (2 / 3) ** 2, 1 / 4]
    assert sum(rate_factor(step, 50) for step in range(100_000)) < 100
    assert {rate_factor(step, None) for step in (0, 10_000)} == {1.0}


def first_move(problem: Problem, state: RunState) -> float:
    """How far one step without moments moves a vector's fastest coordinate: AdamW's rate."""
    after = m_step(problem, state)[0]
    return max(
        float((v - state.vectors[name][encoder]).abs().max())
        for name, of in after.vectors.items()
        for encoder, v in of.items()
    )


def test_tokens_move_by_the_rate_of_their_step(problem: Problem) -> None:
    state, rate = initialise(problem), problem.settings.learning_rate
    for step, factor in ((0, 1.0), (1, 1.0), (5, (2 / 6) ** 2)):
        moved = first_move(problem, replace(state, step=step))
        assert moved == pytest.approx(rate * factor, rel=1e-3)


def test_weights_move_by_the_rate_of_their_step(problem: Problem) -> None:
    """All groups: a LoRA's upper factors start at zero, and decay does not move zeros."""
    slow = replace(problem, joint=replace(problem.joint, steps=6))
    states = [
        state for _, state in learn_joint(slow, replace(initialise(slow), phase="joint", step=5))
    ]
    ups = [x for name, x in states[-1].weights.items() if name.endswith(".lora_up")]
    moved = max(float(x.abs().max()) for x in ups)
    assert moved == pytest.approx(problem.joint.weights_rate * (2 / 6) ** 2, rel=1e-3)
