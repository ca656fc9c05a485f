"""The first step looks whether the diffusion loss alone reaches the tokens; a batch of one time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_host import ToyHost

from em_core.errors import UserError
from em_core.examples import Example
from em_core.masks.settings import MaskSettings
from em_core.method.m_step import draw, m_step
from em_core.method.maps import read_attention
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.model.protocol import Conditioning
from em_core.prompts import ConceptPrompt
from em_core.runs.runner import run
from em_core.settings import EMSettings

SETTINGS = EMSettings(
    steps=3, e_step_every=2, batch=3, refresh=1, learning_rate=1e-2,
    masks=MaskSettings(init_timesteps=2, crf=None),
)  # fmt: skip


class Changed(ToyHost):
    """A model whose prediction goes through a function."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def predict(self, Z_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.change(super().predict(Z_t, t, conditioning))


class Zero(torch.autograd.Function):
    """The identity, whose gradient is all zeros: a kernel with a backward that does nothing."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.zeros_like(grad)


def problem_on(host: ToyHost) -> Problem:
    picture = torch.full((3, 32, 32), 0.5)
    picture[:, 8:24, 4:16] = torch.tensor([0.9, 0.2, 0.2])[:, None, None]
    picture[:, 8:24, 18:30] = torch.tensor([0.2, 0.2, 0.9])[:, None, None]
    prompt = ConceptPrompt.parse("<rex:red> and <doll:blue> on grey")
    return prepare(host, [Example(picture, prompt)], SETTINGS)  # type: ignore[arg-type]


def test_looking_changes_no_bit() -> None:
    problem = problem_on(ToyHost())
    state = initialise(problem)
    with_look, _, terms, _ = m_step(problem, state, first=True)
    without, _, others, _ = m_step(problem, state)
    for name, of in with_look.vectors.items():
        assert all(torch.equal(v, without.vectors[name][e]) for e, v in of.items())
    assert terms == others


@pytest.mark.parametrize(
    "host", [Changed(lambda x: x.detach()), Changed(Zero.apply)], ids=["cut", "zero"]
)
def test_a_cut_stops_the_run_with_the_reason(host: ToyHost) -> None:
    """Eq. 4 still has a gradient, since the maps are taken before."""
    problem = problem_on(host)
    state = initialise(problem)
    with pytest.raises(UserError, match=r"diffusion loss does not reach the token of .*rex"):
        run(problem, state)
    after = m_step(problem, state)[0]
    assert not torch.equal(
        after.vectors["rex"]["colours"], state.vectors["rex"]["colours"]
    )  # what would have gone on as if all were well


def test_concepts_that_are_not_drawn_and_empty_masks_are_no_cut() -> None:
    problem = problem_on(ToyHost())
    state = initialise(problem)
    nothing = [replace(p, masks=torch.zeros_like(p.masks)) for p in state.pictures]
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed).get_state()
        m_step(problem, replace(state, generator=generator), first=True)
        m_step(problem, replace(state, generator=generator, pictures=tuple(nothing)), first=True)


def test_one_time_where_the_host_asks_for_it() -> None:
    host = ToyHost()
    problem, seen = problem_on(host), []
    plain = host.predict
    host.predict = lambda Z, t, c: seen.append(t.tolist()) or plain(Z, t, c)  # type: ignore[assignment,func-returns-value]
    host.one_time = True  # type: ignore[attr-defined]
    state = initialise(problem)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(20)]
    times = [draw(problem, state, generator).t.tolist() for generator in seeds]
    assert all(len(t) == 3 and len(set(t)) == 1 for t in times)
    assert min(t[0] for t in times) < 0.3 and max(t[0] for t in times) > 0.7
    (prepared,) = problem.pictures
    vectors = {
        c.name: host.initial_vectors(c.words, 1, torch.Generator()) for c in problem.concepts
    }
    arguments = (host, prepared, vectors, problem.settings.masks, 5)
    seen.clear()
    one_by_one = read_attention(*arguments, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert [len(t) for t in seen] == [1] * 5
    host.one_time = False  # type: ignore[attr-defined]
    together = read_attention(*arguments, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    torch.testing.assert_close(one_by_one.maps, together.maps)
