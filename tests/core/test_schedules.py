"""Noise schedules in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from em_core.model.schedules import FlowMatching, NoiseSchedule, VariancePreserving, stratified

ALPHAS = torch.tensor([0.81, 0.64, 0.36, 0.0])
SCHEDULES = [
    VariancePreserving(torch.linspace(0.999, 0.01, 1000)),
    FlowMatching(),
    FlowMatching(shift=3.0),
]


def latents() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 5, 5, generator=g), torch.randn(3, 4, 5, 5, generator=g)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fulfil_the_protocol_and_weigh_all_times_alike(schedule: NoiseSchedule) -> None:
    assert isinstance(schedule, NoiseSchedule)
    assert torch.equal(schedule.weight(torch.tensor([0.0, 0.5, 1.0])), torch.ones(3))


def test_noise_and_targets_at_known_alpha_bar() -> None:
    """Z_t = a Z_0 + s eps and v = a eps - s Z_0 with a^2 = alpha_bar, s^2 = 1 - alpha_bar."""
    Z0, eps = latents()
    t = torch.tensor([0.0, 1.0, 2.0])
    a = torch.tensor([0.9, 0.8, 0.6]).reshape(3, 1, 1, 1)
    s = torch.tensor([math.sqrt(0.19), 0.6, 0.8]).reshape(3, 1, 1, 1)
    of_noise, of_v = VariancePreserving(ALPHAS), VariancePreserving(ALPHAS, "v_prediction")
    torch.testing.assert_close(of_noise.add_noise(Z0, eps, t), a * Z0 + s * eps)
    assert torch.equal(of_v.add_noise(Z0, eps, t), of_noise.add_noise(Z0, eps, t))
    assert torch.equal(of_noise.target(Z0, eps, t), eps)
    torch.testing.assert_close(of_v.target(Z0, eps, t), a * eps - s * Z0)


def test_zero_terminal_snr() -> None:
    """Where alpha_bar is 0 nothing of the picture is left, and v is all of it (arXiv 2305.08891)."""
    Z0, eps = latents()
    schedule, t = VariancePreserving(ALPHAS, "v_prediction"), torch.full((3,), 3.0)
    assert torch.equal(schedule.add_noise(Z0, eps, t), eps)
    assert torch.equal(schedule.target(Z0, eps, t), -Z0)


def test_schedule_targets() -> None:
    """From Z_t and either target, Z_0 comes back: Z_0 = (Z_t - s eps) / a = a Z_t - s v."""
    alphas = torch.linspace(0.999, 0.01, 50)
    Z0, eps = latents()
    steps = torch.tensor([0, 20, 49])
    t = steps.float()
    a, s = (x[:, None, None, None] for x in (alphas[steps].sqrt(), (1 - alphas[steps]).sqrt()))
    Z_t = VariancePreserving(alphas).add_noise(Z0, eps, t)
    torch.testing.assert_close(
        (Z_t - s * VariancePreserving(alphas).target(Z0, eps, t)) / a, Z0, atol=1e-4, rtol=0
    )
    v = VariancePreserving(alphas, "v_prediction").target(Z0, eps, t)
    torch.testing.assert_close(a * Z_t - s * v, Z0, atol=1e-5, rtol=0)


def test_a_time_between_two_steps_is_the_nearer_one() -> None:
    Z0, eps = latents()
    schedule = VariancePreserving(ALPHAS, "v_prediction")
    between, whole = torch.tensor([0.4, 0.6, 2.4]), torch.tensor([0.0, 1.0, 2.0])
    for of in (schedule.add_noise, schedule.target):
        assert torch.equal(of(Z0, eps, between), of(Z0, eps, whole))


def test_as_many_draws_as_steps_are_all_steps() -> None:
    schedule = VariancePreserving(torch.linspace(0.99, 0.01, 64))
    assert torch.equal(schedule.draw_times(64, seeded()), torch.arange(64.0))
    assert torch.equal(schedule.draw_times(16, seeded(), 0.25, 0.5), torch.arange(16.0, 32.0))


def test_no_step_lies_beyond_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the largest random number below 1 is rounded up to it."""
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.full(size, 1 - 2**-24))
    drawn = VariancePreserving(torch.linspace(0.99, 0.01, 64)).draw_times(1000, seeded())
    assert float(drawn.max()) == 63


def test_steps_within_shares() -> None:
    schedule = VariancePreserving(torch.linspace(0.99, 0.01, 1000))
    t = torch.tensor([49.0, 50.0, 399.0, 400.0])
    assert schedule.within(t, 0.05, 0.4).tolist() == [False, True, True, False]


def test_flow_is_a_straight_line_whose_slope_is_the_target() -> None:
    Z0, eps = latents()
    flow, s = FlowMatching(), torch.tensor([0.0, 0.25, 1.0])
    Z_s = flow.add_noise(Z0, eps, s)
    assert torch.equal(Z_s[0], Z0[0]) and torch.equal(Z_s[2], eps[2])
    torch.testing.assert_close(Z_s[1], 0.75 * Z0[1] + 0.25 * eps[1])
    torch.testing.assert_close(flow.target(Z0, eps, s), eps - Z0)
    ahead = flow.add_noise(Z0, eps, s + 0.5) - Z_s
    torch.testing.assert_close(ahead, 0.5 * flow.target(Z0, eps, s), atol=1e-6, rtol=1e-5)


def test_the_shift_in_closed_form() -> None:
    """s = 3 u / (1 + 2 u) takes 1/4, 1/2 and 1 to 1/2, 3/4 and 1, and shares take them back."""
    flow = FlowMatching(shift=3.0)
    s, u = torch.tensor([0.0, 0.5, 0.75, 1.0]), torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(flow.shares(s), u)
    drawn = flow.draw_times(1000, seeded())
    uniform = stratified(1000, seeded()).tolist()
    assert drawn.tolist() == pytest.approx([3 * x / (1 + 2 * x) for x in uniform], abs=1e-6)
    assert torch.equal(FlowMatching().draw_times(1000, seeded()), stratified(1000, seeded()))


def test_shifted_times_within_shares() -> None:
    s = torch.tensor([0.49, 0.5, 0.74, 0.75])
    assert FlowMatching(shift=3.0).within(s, 0.25, 0.5).tolist() == [False, True, True, False]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.05, 0.4)])
def test_one_time_is_drawn_from_each_equal_part(
    schedule: NoiseSchedule, low: float, high: float
) -> None:
    """Ten times from ten parts, whatever the seed."""
    edges = [low + (high - low) * i / 10 for i in range(11)]
    for seed in range(20):
        t = schedule.draw_times(10, seeded(seed), low, high)
        assert schedule.within(t, low, high).all()
        for i, (a, b) in enumerate(pairwise(edges)):
            inside = schedule.within(t, a, b)
            assert inside.tolist() == [j == i for j in range(10)]


def test_draws_spread_evenly_within_their_parts() -> None:
    """Over many seeds the mean of each part's draws is its middle, and their deviation a uniform's."""
    drawn = torch.stack([stratified(4, seeded(seed), 0.2, 0.6) for seed in range(2000)])
    middles = torch.tensor([0.25, 0.35, 0.45, 0.55])
    torch.testing.assert_close(drawn.mean(dim=0), middles, atol=3e-3, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), torch.full((4,), 0.1 / 12**0.5), atol=2e-3, rtol=0)
