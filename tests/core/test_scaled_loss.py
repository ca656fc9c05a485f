"""Losses scaled against the narrow range of float16, and passes that go through the model in parts."""

from dataclasses import replace

import pytest
import torch
from equality import differences
from torch import Tensor
from whole_runs import JOINT, finish

from em_core.errors import TrainingError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.m_step import m_step
from em_core.method.maps import read_attention
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.runs.runner import run
from em_core.settings import EMSettings

LORA = replace(JOINT, kind="lora", prior_weight=1.0, prior_pictures=1)


def scaled(host: DiffusersHost, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(host, "loss_scale", scale, raising=False)


def narrow_backward(host: DiffusersHost, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the gradient of the prediction pass through float16; gives the largest value of each pass."""
    predict, seen = host.predict, []

    def through(gradient: Tensor) -> Tensor:
        seen.append(float(gradient.abs().max()))
        return gradient.half().float()

    def narrow(*args: Tensor) -> Tensor:
        out = predict(*args)
        if out.requires_grad:
            out.register_hook(through)
        return out

    monkeypatch.setattr(host, "predict", narrow)
    return seen


def test_a_scale_changes_nothing_where_the_type_is_wide(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two only moves exponents: both phases, the prior's loss too, bit for bit."""
    problem = prepare(host, [example], replace(short, steps=3), LORA)
    plain, _ = finish(problem)
    scaled(host, monkeypatch, 2.0**10)
    again, _ = finish(problem)
    assert not differences(plain, again)


def test_a_scale_that_overflows_is_lowered_and_the_step_taken_again(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of float16 with a scale that fits; the random draws are the same."""
    problem = prepare(host, [example], replace(short, steps=3), LORA)
    expected, _ = finish(problem)
    seen = narrow_backward(host, monkeypatch)
    scaled(host, monkeypatch, 2.0**40)
    state, _ = finish(problem)
    assert 1 < host.loss_scale < 2.0**40 and max(seen) > 65504 > seen[-1]  # type: ignore[attr-defined]
    for name, of in expected.vectors.items():
        torch.testing.assert_close(state.vectors[name], of, atol=2e-3, rtol=0)


def test_a_gradient_that_no_scale_makes_finite_is_an_error(
    host: DiffusersHost, example: Example, short: EMSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = host.predict

    def broken(*args: Tensor) -> Tensor:
        out = predict(*args)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.nan)
        return out

    problem = prepare(host, [example], replace(short, mode="fixed"))
    state = initialise(problem)
    monkeypatch.setattr(host, "predict", broken)
    scaled(host, monkeypatch, 2.0**16)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        run(problem, state)
    assert host.loss_scale == 1  # type: ignore[attr-defined]


def test_losses_are_those_that_were_stepped_on(
    host: DiffusersHost, example: Example, short: EMSettings
) -> None:
    """The values that come with a step are numbers, and their weighted sum is the total."""
    problem = prepare(host, [example], short)
    _, _, values, _ = m_step(problem, initialise(problem))
    weighted = values["diffusion"] + short.attention_weight * values["attention"]
    assert values["total"] == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 3])
def test_a_host_limits_the_passes_at_once(
    host: DiffusersHost,
    example: Example,
    short: EMSettings,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    problem = prepare(host, [example], short)
    (prepared,), vectors = problem.pictures, initialise(problem).vectors
    predict, batches = host.predict, []

    def counted(Z_t: Tensor, *args: Tensor) -> Tensor:
        batches.append(len(Z_t))
        return predict(Z_t, *args)

    def measure() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return read_attention(host, prepared, vectors, short.masks, 7, generator).maps

    expected = measure()
    monkeypatch.setattr(host, "predict", counted)
    monkeypatch.setattr(host, "passes_at_once", limit, raising=False)
    torch.testing.assert_close(measure(), expected)
    assert max(batches) == limit and sum(batches) == 7
