"""Learning and drawing on a graphics card: close to what the CPU does, and the same every time where it can be.

Without a card, these are skipped; on one, ComfyUI's nodes are tested too if $VISUAL_CONCEPTS_DEVICE is set, as
CONTRIBUTING.md says.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from equality import differences

from em_core.demo import model_path
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.crf import CUTLER, MaskRefiner
from em_core.masks.crf.filtering import histogram
from em_core.masks.measures import iou
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.presets import joint_settings, visual_settings
from em_core.runs.concept_set import conclude
from em_core.runs.finding import discover
from em_core.runs.runner import run
from em_core.runs.state_file import StateFile
from em_core.runs.visual import learn_visual
from em_core.settings import EMSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True, scope="module")
def full_precision() -> Iterator[None]:
    """Convolutions in float32 proper, so that the CPU's results are an oracle."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def card() -> DiffusersHost:
    return DiffusersHost.load(model_path(), device="cuda")


def problem_on(host: DiffusersHost, example: Example, settings: EMSettings, kind: str) -> Problem:
    problem = prepare(host, [example], settings)
    joint = replace(joint_settings(host.identity().family, kind), steps=4)
    return replace(problem, joint=joint)


@pytest.mark.parametrize("kind", ["none", "lora", "cross_attention", "full"])
def test_learning_is_the_cpus(
    host: DiffusersHost, card: DiffusersHost, example: Example, short: EMSettings, kind: str
) -> None:
    """The same masks and nearly the same vectors: all noise is drawn on the CPU."""
    results = []
    for place in (host, card):
        problem = problem_on(place, example, replace(short, steps=4, e_step_every=2), kind)
        results.append(conclude(problem, run(problem, initialise(problem))))
    cpu, gpu = results
    for name, vectors in cpu.vectors.items():
        for encoder, expected in vectors.items():
            found = gpu.vectors[name][encoder].cpu()
            torch.testing.assert_close(found, expected.cpu(), atol=5e-3, rtol=0)
    for expected, found in zip(cpu.masks, gpu.masks, strict=True):
        for name, mask in expected.items():
            assert iou(mask[None] > 0.5, found[name].cpu()[None] > 0.5).item() > 0.98
    drawn = [
        place.generate("a photo of <rex>", of, [3], 4) for place, of in ((host, cpu), (card, gpu))
    ]
    assert (drawn[0] - drawn[1].cpu()).abs().mean() < 0.02


def test_half_precision_finds_the_same_masks(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    half = DiffusersHost.load(model_path(), device="cuda", dtype="auto")
    assert half.dtype in (torch.bfloat16, torch.float32)
    masks = [
        initialise(prepare(place, [example], short)).pictures[0].masks for place in (host, half)
    ]
    assert (iou(masks[0] > 0.5, masks[1].cpu() > 0.5) > 0.95).all()


def test_a_stopped_run_goes_on(
    card: DiffusersHost, example: Example, short: EMSettings, tmp_path: Path
) -> None:
    """From a file, in the EM loop and in the joint phase."""
    problem = problem_on(card, example, replace(short, steps=2), "lora")
    seen = []
    end = run(problem, initialise(problem), [lambda event, state: seen.append(state)])
    for stop in (1, 3):  # of the six steps
        file = StateFile(tmp_path / f"{stop}.safetensors", "key")
        file.save(seen[stop])
        again = run(problem, file.load(card.device))
        assert (again.phase, again.step) == (end.phase, end.step) == ("joint", 4)
        assert again.weights.keys() == end.weights.keys()


def test_a_visual_condition_is_learned_and_draws(
    card: DiffusersHost, example: Example, short: EMSettings
) -> None:
    visual = replace(visual_settings(card.identity().family), steps=3)
    condition = learn_visual(card, [example], replace(short, steps=2), visual)
    plain = card.generate("a photo of <rex>", condition.concepts, [1], 3)
    off, on = (
        card.generate("a photo of <rex>", None, [1], 3, condition=condition, strength=strength)
        for strength in (0.0, 1.0)
    )
    assert torch.equal(off, plain) and not torch.equal(on, plain)


def test_things_are_discovered(host: DiffusersHost, card: DiffusersHost, example: Example) -> None:
    here, there = (discover(place, example.picture)[1].masks for place in (host, card))
    assert here.shape == there.shape and (iou(here, there.cpu()) > 0.95).all()


def test_a_crf_is_the_same_every_time(example: Example) -> None:
    """And the CPU's: sums in no fixed order are sums of integers."""
    picture = example.picture.cuda()
    masks = torch.stack([mask.float() for mask in example.truth.values()]).cuda()
    first, again = (MaskRefiner(picture, CUTLER)(masks) for _ in range(2))
    assert differences(first, again) == []
    torch.testing.assert_close(
        first.cpu(), MaskRefiner(example.picture, CUTLER)(masks.cpu()), atol=1e-3, rtol=0
    )
    index, weights = torch.randint(50, (100_000,)).cuda(), torch.rand(100_000).cuda()
    sums = [histogram(index, weights, 60) for _ in range(3)]
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    expected = torch.bincount(index.cpu(), weights.double().cpu(), 60).float()
    torch.testing.assert_close(sums[0].cpu(), expected, atol=1e-4, rtol=1e-6)
