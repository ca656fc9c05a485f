"""Memory plans of the diffusers host: what is chosen, what a plan is, and going on when memory runs out."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_pipelines
from equality import differences
from small_models import sdxl

from em_core import PlannedModel, learn_concepts
from em_core.demo import model_path
from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts import planned
from em_core.hosts.anatomy import anatomy
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.planned import Fitting, TorchMemory, device_of
from em_core.method import loop
from em_core.method import visual as visual_phase
from em_core.model.anatomy import Job
from em_core.model.jobs import Work
from em_core.model.plans import FP8, PLANS, Attempt, Device, attempt
from em_core.presets import em_settings, visual_settings
from em_core.prompts import ConceptPrompt
from em_core.settings import EMSettings, JointSettings, MaskSettings

CARD = Device(torch.bfloat16, True)
LORA, NOTHING = JointSettings(kind="lora", steps=1), JointSettings()
# Of diffusers' Euler scheduler, which SDXL has, with newer versions of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PROMPT = ConceptPrompt.parse("a photo of <rex:star> and <doll:circle> on grass")


class Free:
    """A device's memory with so much of it free, in bytes; `ran_out` is torch's own."""

    def __init__(self, amount: float) -> None:
        self.amount, self.made_room = amount, 0

    def free(self) -> float:
        return self.amount

    def make_room(self) -> None:
        self.made_room += 1

    def ran_out(self, error: Exception) -> bool:
        return TorchMemory(torch.device("cpu")).ran_out(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    sdxl().save_pretrained(path)
    return path


@pytest.fixture
def example() -> Example:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    truth = {name: torch.zeros(64, 64, dtype=torch.bool) for name in PROMPT.names}
    truth["rex"][:32], truth["doll"][32:] = True, True
    return Example(picture, PROMPT, truth)


@pytest.fixture
def brief() -> EMSettings:
    """Six steps under given masks."""
    masks = MaskSettings(init_timesteps=2, crf=None)
    return replace(em_settings("sd1"), mode="given", steps=6, batch=2, masks=masks)


def on_a_card(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    plan: str = "automatic",
    said: list[str] | None = None,
) -> PlannedModel:
    """A model whose device computes in half precision and casts from fp8, as a CPU can do slowly."""
    monkeypatch.setattr(planned, "device_of", lambda device: CARD)
    return PlannedModel(source, "cpu", plan, say=(said if said is not None else []).append)


def test_what_is_chosen_for_what_is_free(
    monkeypatch: pytest.MonkeyPatch, folder: Path, example: Example
) -> None:
    """Each attempt's host is as the plan says; what fits is what the estimate says."""
    said: list[str] = []
    model = on_a_card(monkeypatch, folder, said=said)
    work = Work([example], replace(em_settings("sdxl"), batch=4), LORA)
    seen: list[tuple[Fitting, Attempt]] = []
    make = model.host

    def noting(attempt: Attempt) -> DiffusersHost:
        host = make(attempt)
        seen.append((Fitting(host, work), attempt))
        return host

    monkeypatch.setattr(model, "host", noting)
    model.memory = Free(1e15)  # type: ignore[assignment]
    assert model.carry_out(work, lambda fitting: fitting.work.em.batch) == 4
    model.memory = Free(0.0)  # type: ignore[assignment]
    assert model.carry_out(work, lambda fitting: fitting.work.em.batch) == 1
    (first, largest), (last, smallest) = seen
    assert largest.plan.name == "half" and not first.host.unet.is_gradient_checkpointing
    assert {w.dtype for w in first.host.unet.parameters()} == {torch.bfloat16}
    assert smallest.plan.name == "fp8, recomputing" and last.host.unet.is_gradient_checkpointing
    kinds = {(w.ndim > 1, w.dtype) for w in last.host.unet.parameters()}
    assert kinds == {(True, FP8), (False, torch.bfloat16)}
    assert last.host.passes_at_once == smallest.need.passes
    assert "SDXL, LoRA: " in said[0] and "(memory plan half)." in said[0]
    assert "Samples per step: 1 instead of 4. This may not suffice" in said[1]
    model.memory = Free(largest.need.device - 1)  # type: ignore[assignment]
    model.carry_out(work, lambda fitting: 0)
    assert seen[-1][1].plan.name == "half, recomputing"


def test_plans_that_do_not_go(folder: Path, example: Example) -> None:
    with pytest.raises(
        UserError, match=r"No memory plan 'small'\. Expected one of automatic, float32,"
    ):
        PlannedModel(folder, "cpu", "small")
    work = Work([example], em_settings("sdxl"), JointSettings(kind="full"))
    with pytest.raises(UserError, match="does not fit the memory plan 'half'"):
        PlannedModel(folder, "cpu", "half").carry_out(work, lambda fitting: 0)


def test_the_key_has_the_plan_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Not what is free; but what a plan computes in, which whole weights change."""
    auto, again = (on_a_card(monkeypatch, folder).digest(NOTHING) for _ in range(2))
    assert auto == again
    assert auto != on_a_card(monkeypatch, folder, "fp8, recomputing").digest(NOTHING)
    assert auto != on_a_card(monkeypatch, folder).digest(JointSettings(kind="full"))


def running_out(at: set[int], real: Callable[..., Any], step: Callable[..., int]) -> Any:
    """`real`, but memory runs out once before each of these steps."""
    left = set(at)

    def failing(*args: Any, **more: Any) -> Any:
        if (now := step(*args)) in left:
            left.remove(now)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*args, **more)

    return failing


def test_out_of_memory_goes_on_from_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    example: Example,
    brief: EMSettings,
) -> None:
    """With blocks computed again, which changes no bit: no step is taken twice, and none is left out."""
    model, steps = PlannedModel(model_path()), []
    expected = model.learn_concepts([example], brief)
    failing = running_out({3}, loop.m_step, lambda problem, state, first: state.step)
    monkeypatch.setattr(loop, "m_step", failing)
    model.memory = Free(1e15)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        found = model.learn_concepts(
            [example], brief, listeners=[lambda event, state: steps.append(event.step)]
        )
    assert steps == [0, 1, 2, 3, 4, 5, 6] and model.memory.made_room == 1
    assert "Out of memory with the plan float32 (CUDA" in caplog.text
    assert not differences(expected.vectors, found.vectors)
    assert not differences(expected.curves, found.curves)


def test_a_visual_condition_goes_on_too(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    example: Example,
    brief: EMSettings,
) -> None:
    """Blocks and recomputing together, from within the visual phase."""
    visual = replace(visual_settings("sd1"), steps=4, batch=2)
    model = PlannedModel(model_path())
    expected = model.learn_visual([example], replace(brief, steps=1), visual)
    failing = running_out({2}, visual_phase.visual_step, lambda problem, state, *_: state.step)
    monkeypatch.setattr(visual_phase, "visual_step", failing)
    model.memory = Free(1e15)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        found = model.learn_visual([example], replace(brief, steps=1), visual)
    assert model.memory.made_room == 1
    assert not differences(expected.blocks, found.blocks)


def rounded(host: DiffusersHost) -> DiffusersHost:
    """The host with its UNet's matrices rounded to fp8, in float32."""
    for weight in host.unet.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.to(FP8).float()
    return host


def noise(host: DiffusersHost) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    vectors = {n: host.initial_vectors("", 1, g) for n in PROMPT.names}
    Z, t = torch.randn(2, 4, 32, 32, generator=g), torch.tensor([50.0, 700.0])
    return host.predict(Z, t, host.encode_prompts([PROMPT] * 2, vectors))


def test_fp8_is_only_how_weights_rest(folder: Path, example: Example, brief: EMSettings) -> None:
    """Bit for bit what the rounded weights give, with and without a gradient, a LoRA and differences."""
    fp8 = DiffusersHost(sdxl(), storage=FP8)
    wide = rounded(DiffusersHost(sdxl()))
    size = sum(w.numel() * w.element_size() for w in fp8.unet.parameters())
    assert size < 0.3 * sum(w.numel() * w.element_size() for w in wide.unet.parameters())
    assert torch.equal(noise(fp8), noise(wide))
    with torch.no_grad():
        assert torch.equal(noise(fp8), noise(wide))
        g = torch.Generator().manual_seed(3)
        weights = {
            f"{name}.diff": torch.randn(p.shape, generator=g) * 0.02
            for name, p in wide.weights("cross_attention").items()
        }
        with fp8.applied(weights, 1.0), wide.applied(weights, 1.0):
            assert torch.equal(changed := noise(fp8), noise(wide))
        assert not torch.equal(changed, noise(fp8))
    work = Work([example], replace(brief, steps=2), replace(LORA, steps=2))
    found = [learn_concepts(host, work.examples, work.em, work.joint) for host in (fp8, wide)]
    assert not differences(found[0].vectors, found[1].vectors)
    assert not differences(found[0].weights, found[1].weights)
    found[0].require_fit(DiffusersHost(sdxl()).identity())
    assert torch.isfinite(fp8.generate("<rex> on grass", found[0], [1], steps=1)).all()


def test_fp8_is_read_from_a_folder(folder: Path) -> None:
    host = DiffusersHost.load(folder, dtype="bfloat16", storage=FP8)
    kinds = {(w.ndim > 1, w.dtype) for w in host.unet.parameters()}
    assert kinds == {(True, FP8), (False, torch.bfloat16)}
    with torch.no_grad():
        assert torch.isfinite(noise(host)).all()


def test_what_a_cpu_can_do() -> None:
    cpu = torch.device("cpu")
    assert device_of(cpu) == Device(None, False)
    assert TorchMemory(cpu).free() > 2**20
    TorchMemory(cpu).make_room()


CASES = [("sd1", 512, "half", 1), ("sd1", 512, "fp8, recomputing", 2)]
SLOW = [("sdxl", 1024, "half", 1), ("sdxl", 1024, "half, recomputing", 1)]


@pytest.mark.parametrize(
    ("family", "side", "plan", "batch"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_the_estimate_is_the_count(
    monkeypatch: pytest.MonkeyPatch, family: str, side: int, plan: str, batch: int
) -> None:
    """Of diffusers' own classes at full size, within a tenth."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", whole_pipelines.fused)
    chosen = next(one for one in PLANS if one.name == plan)
    pipeline = whole_pipelines.pipeline(family)
    storage = FP8 if chosen.fp8 else None
    host = DiffusersHost(pipeline, "meta", None, torch.bfloat16, chosen.recompute, storage)
    job = Job(side // 8, side // 8, batch=batch, texts=batch)
    tried = attempt(chosen, CARD, lambda dtype: anatomy(host, dtype), job)
    assert tried.need.running == pytest.approx(whole_pipelines.counted(host, tried, side), rel=0.1)
