"""A step waits for its device once, when it reads the losses; what is the same in each step is made once."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import sdxl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from em_core.commands.common import load_host
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.e_step import with_free_statistics
from em_core.method.joint import learn_joint
from em_core.method.m_step import m_step
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.method.state import RunState
from em_core.model.vectors import TableStatistics
from em_core.settings import EMSettings, JointSettings, MaskSettings

aten = torch.ops.aten
ONE_VALUE = (aten._local_scalar_dense.default, aten.equal.default)
BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
MOVED = "moved to the device"
ON_DEVICE = ("maps", "pending", "pending_count", "masks", "labels", "first")
ANY_SIZE = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)


class Waits(TorchDispatchMode):
    """Counts what a device would be waited for; the meta device stands for it, on which values are 1.

    Attributes:
        counts: operator -> how often something was read from the device for which it has to be waited
            for; and how often something was moved there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and first.is_meta:
            if function in ONE_VALUE:
                self.counts[str(function)] += 1
                return first.dtype == torch.bool or 1.0
            if function in ANY_SIZE or (function in BY_INDEX and is_mask(args[1])):
                self.counts[str(function)] += 1
            if function is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
                self.counts[str(function)] += 1
                return torch.ones(first.shape, dtype=kwargs.get("dtype") or first.dtype)
        elif first is not None and str(kwargs.get("device")) == "meta":
            self.counts[MOVED] += 1
        return function(*args, **kwargs)

    def taken(self) -> dict[str, int]:
        """What was counted since this was last asked for."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


def is_mask(index: Any) -> bool:
    """Whether an index is a mask, whose number of true values has to be known."""
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in index)


class Lists(TorchFunctionMode):
    """Refuses Python's numbers where they would be moved to the device under the hood."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in index), f"indexed by the list {index}"
        made = function in (torch.tensor, torch.as_tensor)
        assert not made or "meta" not in str(kwargs.get("device")), "made of numbers on the device"
        return function(*args, **kwargs)


def moved(state: RunState, device: str) -> RunState:
    """A state as it is on another device."""
    pictures = tuple(
        replace(p, **{n: getattr(p, n).to(device) for n in ON_DEVICE}) for p in state.pictures
    )
    vectors = {c: {e: v.to(device) for e, v in of.items()} for c, of in state.vectors.items()}
    return replace(state, pictures=pictures, vectors=vectors)


def started(kind: str, example: Example, em: EMSettings) -> tuple[Problem, RunState]:
    """A run whose first masks were found on the CPU, and whose steps are taken on the meta device."""
    on_cpu = load_host("demo") if kind == "sd1" else DiffusersHost(sdxl())
    problem = prepare(on_cpu, [example], em, JointSettings(kind="lora", steps=2))
    state = moved(initialise(problem), "meta")
    host = DiffusersHost(on_cpu.pipeline, "meta", on_cpu.known_words)
    picture = replace(problem.pictures[0], Z0=problem.pictures[0].Z0.to("meta"))
    return replace(problem, host=host, pictures=(picture,)), state


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_step_waits_once(kind: str, example: Example) -> None:
    """For the losses, the norm of the gradient among them; so do the statistics and a LoRA's step."""
    em = EMSettings(
        batch=2, masks=MaskSettings(init_timesteps=2, crf=None, regions=None), mode="em",
        union_sampling=True, free_statistics=True,
    )  # fmt: skip
    problem, state = started(kind, example, em)
    # Times, noise, which concepts are present, the selection matrix; and each encoder's ids.
    moves = 4 + len(problem.host.encoders)
    with Waits():
        m_step(problem, state)  # has made what is made once
    with Lists(), Waits() as waits:
        for _ in range(2):
            state, drawn, _, maps = m_step(problem, state)
            state = with_free_statistics(problem, state, drawn, maps)
            assert waits.taken() == {"aten._to_copy.default": 1, MOVED: moves}
        joint = learn_joint(problem, state)
        next(joint)
        waits.taken()
        next(joint)
        assert waits.taken() == {"aten._to_copy.default": 1, MOVED: moves}
        joint.close()


def test_the_stand_in_sees_what_is_waited_for() -> None:
    x = torch.ones(4, device="meta")
    with Waits() as waits:
        x.sum().item(), x.cpu(), bool(x.any())
        with pytest.raises(NotImplementedError):
            x[x > 0]
    assert sum(waits.counts.values()) == 4
    for wrong in (lambda: x[[0, 1]], lambda: torch.tensor([1.0], device="meta")):
        with Lists(), pytest.raises(AssertionError):
            wrong()


def test_the_token_table_is_read_once(host: DiffusersHost, monkeypatch) -> None:
    """However many concepts start at random."""
    real, read = TableStatistics.of, []
    monkeypatch.setattr(TableStatistics, "of", lambda table: read.append(table) or real(table))
    fresh = DiffusersHost(host.pipeline, known_words=host.known_words)
    for _ in range(3):
        fresh.initial_vectors("", 2, torch.Generator())
    assert len(read) == 1
