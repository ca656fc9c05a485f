"""The hash of a run's model and patches: equal for equal content in any process, different for all else."""

import collections
import datetime
import functools
import math
import operator
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from em_core.runs import digest
from em_core.runs.digest import Digest, Unreadable

STRENGTH = 0.5
G = torch.Generator().manual_seed(0)
LARGE = torch.rand(1100, 1024, generator=G)


def of(value: Any) -> str:
    return Digest().add(value).hexdigest()


class Plain:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Slots:
    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Derived(Slots):
    __slots__ = ("more",)

    def __init__(self, scale: float, more: int) -> None:
        super().__init__(scale)
        self.more = more


class Words(dict):
    """A container with an attribute."""

    def __init__(self, scale: float) -> None:
        super().__init__(a=1)
        self.scale = scale


class Pair(NamedTuple):
    a: int
    b: int


class Colour(Enum):
    RED, BLUE = 1, 2


@dataclass(frozen=True)
class Frozen:
    a: int
    b: torch.Tensor


def scaled(x: float, by: float = 2.0, *, more: float = 0.0) -> float:
    return x * by + more


def closing(scale: Any) -> Callable:
    def patch(x: Any) -> Any:
        return x * scale

    return patch


def written(source: str, name: str = "f", **known: Any) -> Any:
    """What a module of this source defines under a name."""
    names: dict[str, Any] = {"__name__": "written", **known}
    exec(source, names)  # noqa: S102
    return names[name]


def wide(changed: bool) -> torch.Tensor:
    """A mask of 1024x1024 pixels; a fifth of it differs, in all but its first column."""
    mask = torch.zeros(1024, 1024)
    mask[100:300, 1:] = float(changed)
    return mask


def swapped(x: torch.Tensor) -> torch.Tensor:
    """Four values change places so that the sums along either axis stay."""
    x = x.clone()
    x[10, 20], x[10, 21], x[11, 20], x[11, 21] = 0.0, 1.0, 1.0, 0.0
    return x


def other(x: torch.Tensor) -> torch.Tensor:
    x = swapped(x)
    x[10:12, 20:22] = 1 - x[10:12, 20:22]
    return x


def one_bit(x: torch.Tensor, place: int) -> torch.Tensor:
    x = x.clone()
    x.view(torch.int32).view(-1)[place] ^= 1
    return x


def with_attribute(value: float) -> Callable:
    patch = closing(1.0)
    patch.scale = value  # type: ignore[attr-defined]
    return patch


def layer(value: float, scale: float = 1.0) -> nn.Module:
    made = nn.Linear(2, 2)
    made.weight.data = torch.full((2, 2), value)
    made.bias.data = torch.zeros(2)
    made.scale = scale  # type: ignore[assignment]
    return made


def hidden(value: float) -> nn.Module:
    """A buffer that is in no state dict."""
    made = layer(0.0)
    made.register_buffer("table", torch.tensor([value]), persistent=False)
    return made


def hooked(by: float) -> nn.Module:
    made = layer(0.0)
    made.register_forward_hook(closing(by))
    return made


def sampling(kind: type) -> Any:
    class Advanced(Slots, kind):  # type: ignore[misc]
        pass

    return Advanced


def itself(value: float) -> list:
    made: list = [value]
    made.append(made)
    return made


def nested(value: float, depth: int) -> Any:
    made: Any = value
    for _ in range(depth):
        made = [made]
    return made


class ByOne:
    pass


class ByTwo:
    pass


# Each is two makers of values that act differently, though a shallow look takes them for equal.
DIFFERENT: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a fifth of a mask": (lambda: wide(False), lambda: wide(True)),
    "equal sums along both axes": (lambda: swapped(LARGE), lambda: other(LARGE)),
    "first bit": (lambda: LARGE, lambda: one_bit(LARGE, 0)),
    "last bit": (lambda: LARGE, lambda: one_bit(LARGE, -1)),
    "a bit within": (lambda: LARGE, lambda: one_bit(LARGE, 654_321)),
    "transposed": (lambda: LARGE[:64, :64], lambda: LARGE[:64, :64].T),
    "two signs": (lambda: torch.ones(2**21), lambda: torch.ones(2**21).index_fill_(0, torch.tensor([5, 9]), -1)),
    "shape": (lambda: torch.zeros(2, 3), lambda: torch.zeros(3, 2)),
    "type": (lambda: torch.zeros(4), lambda: torch.zeros(4, dtype=torch.int32)),
    "half": (lambda: torch.ones(4).half(), lambda: torch.ones(4).bfloat16()),
    "negative zero": (lambda: torch.zeros(1), lambda: -torch.zeros(1)),
    "conjugate": (lambda: torch.tensor([1j]), lambda: torch.tensor([1j]).conj()),
    "arrays": (lambda: np.arange(4), lambda: np.arange(4) + 1),
    "type of arrays": (lambda: np.zeros(4, np.int32), lambda: np.zeros(4, np.float32)),
    "arrays of objects": (lambda: np.array([1, "a"], object), lambda: np.array([1, "b"], object)),
    "numbers of numpy": (lambda: np.float32(1), lambda: np.float32(2)),
    "partial": (lambda: functools.partial(scaled, by=1), lambda: functools.partial(scaled, by=2)),
    "partial's function": (lambda: functools.partial(max, 1), lambda: functools.partial(min, 1)),
    "slots": (lambda: Slots(1), lambda: Slots(2)),
    "inherited slots": (lambda: Derived(1, 0), lambda: Derived(2, 0)),
    "builtins": (lambda: math.sin, lambda: math.cos),
    "methods of builtins": (lambda: [1].index, lambda: [2].index),
    "ufuncs": (lambda: np.sin, lambda: np.cos),
    "operators": (lambda: operator.itemgetter(0), lambda: operator.itemgetter(1)),
    "operations": (lambda: torch.ops.aten.add.Tensor, lambda: torch.ops.aten.sub.Tensor),
    "constants": (lambda: written("def f(x): return x * 2"), lambda: written("def f(x): return x * 3")),
    "names": (lambda: written("def f(x): return x.a"), lambda: written("def f(x): return x.b")),
    "inner constants": (
        lambda: written("def f(): return lambda x: x * 2"), lambda: written("def f(): return lambda x: x * 3"),
    ),
    "defaults": (lambda: written("def f(x, a=1): pass"), lambda: written("def f(x, a=2): pass")),
    "keyword defaults": (lambda: written("def f(*, a=1): pass"), lambda: written("def f(*, a=2): pass")),
    "closure": (lambda: closing(1.0), lambda: closing(2.0)),
    "closure of None": (lambda: closing(None), lambda: closing(0)),
    "closed over tensors": (lambda: closing(torch.zeros(2)), lambda: closing(torch.ones(2))),
    "attributes of functions": (lambda: with_attribute(1.0), lambda: with_attribute(2.0)),
    "globals": (lambda: written("def f(): return a", a=1), lambda: written("def f(): return a", a=2)),
    "containers in globals": (
        lambda: written("def f(): return a", a={"b": [1]}), lambda: written("def f(): return a", a={"b": [2]}),
    ),
    "called functions": (
        lambda: written("def f(x): return g(x)\ndef g(x): return x + 1"),
        lambda: written("def f(x): return g(x)\ndef g(x): return x + 2"),
    ),
    "classes": (
        lambda: written("class f:\n def g(self): return 1"), lambda: written("class f:\n def g(self): return 2"),
    ),
    "class attributes": (lambda: written("class f: a = 1"), lambda: written("class f: a = 2")),
    "properties": (
        lambda: written("class f:\n @property\n def g(self): return 1"),
        lambda: written("class f:\n @property\n def g(self): return 2"),
    ),
    "static methods": (
        lambda: written("class f:\n @staticmethod\n def g(): return 1"),
        lambda: written("class f:\n @staticmethod\n def g(): return 2"),
    ),
    "base classes": (lambda: sampling(ByOne), lambda: sampling(ByTwo)),
    "objects": (lambda: Plain(a=1), lambda: Plain(a=2)),
    "classes of objects": (lambda: ByOne(), lambda: ByTwo()),
    "methods of objects": (lambda: Plain(a=1).__init__, lambda: Plain(a=2).__init__),
    "dataclasses": (lambda: Frozen(1, torch.zeros(1)), lambda: Frozen(1, torch.ones(1))),
    "attributes of containers": (lambda: Words(1), lambda: Words(2)),
    "named tuples": (lambda: Pair(1, 2), lambda: (1, 2)),
    "enums": (lambda: Colour.RED, lambda: Colour.BLUE),
    "sets": (lambda: {"a", "b"}, lambda: {"a", "c"}),
    "order of lists": (lambda: [1, 2], lambda: [2, 1]),
    "grouping": (lambda: [[1], 2], lambda: [[1, 2]]),
    "text and bytes": (lambda: "a", lambda: b"a"),
    "joined texts": (lambda: ["a", "b"], lambda: ["a b"]),
    "numbers": (lambda: 1, lambda: 1.0),
    "truth": (lambda: True, lambda: 1),
    "patterns": (lambda: re.compile("a"), lambda: re.compile("a", re.I)),
    "paths": (lambda: Path("a"), lambda: Path("b")),
    "dates": (lambda: datetime.date(2020, 1, 1), lambda: datetime.date(2020, 1, 2)),
    "slices": (lambda: slice(1), lambda: slice(2)),
    "deques": (lambda: collections.deque([1]), lambda: collections.deque([2])),
    "default dicts": (lambda: collections.defaultdict(int), lambda: collections.defaultdict(float)),
    "namespaces": (lambda: types.SimpleNamespace(a=1), lambda: types.SimpleNamespace(a=2)),
    "weights": (lambda: layer(1.0), lambda: layer(2.0)),
    "attributes of layers": (lambda: layer(1.0, 1.0), lambda: layer(1.0, 2.0)),
    "buffers in no state dict": (lambda: hidden(1.0), lambda: hidden(2.0)),
    "hooks": (lambda: hooked(1.0), lambda: hooked(2.0)),
    "order of layers": (
        lambda: nn.Sequential(nn.ReLU(), nn.Tanh()), lambda: nn.Sequential(nn.Tanh(), nn.ReLU()),
    ),
    "kinds of layers": (lambda: nn.Sequential(nn.ReLU()), lambda: nn.Sequential(nn.Tanh())),
    "far below": (lambda: nested(1, 5000), lambda: nested(2, 5000)),
    "within itself": (lambda: itself(1), lambda: itself(2)),
    "one object or two": (lambda: [[1]] * 2, lambda: [[1], [1]]),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_acts_differently_is_hashed_differently(what: str) -> None:
    """And what is made again in the same way is hashed the same."""
    one, two = DIFFERENT[what]
    assert of(one()) != of(two())
    assert of(one()) == of(one()) and of(two()) == of(two())


@pytest.mark.parametrize("size", [(1000, 1100), (7, 300_000), (64, 64, 40, 40), (3_000_001,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.bool])
def test_every_element_of_a_large_tensor_counts(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """At random places, whatever its shape; a stride that divides the row saw one column alone."""
    x = (torch.rand(size, generator=G) * 2).to(dtype)
    before = of(x)
    for place in torch.randint(x.numel(), (5,), generator=G).tolist():
        flat, kept = x.view(-1), x.view(-1)[place].clone()
        flat[place] = not kept if dtype == torch.bool else kept + 1
        assert of(x) != before, f"element {place}"
        flat[place] = kept
    assert of(x) == before


def test_equal_content_is_hashed_the_same() -> None:
    """Where it lies in memory, on which object it is, and what no run reads, says nothing."""
    assert of(LARGE) == of(LARGE.clone()) == of(LARGE.T.contiguous().T)
    assert of(LARGE) == of(LARGE.clone().requires_grad_())
    assert of([(1, 2), (1, 2)]) == of([(1, 2), tuple([1, 2])])
    assert of({"b", "a"}) == of({"a", "b"})
    assert of(Plain(lock=threading.Lock())) == of(Plain(lock=threading.Lock()))
    assert of(written("def f():\n\n\n return 1")) == of(written("def f(): return 1"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: (folder / "x").open("w"), "TextIOWrapper"),
        (lambda folder: (i for i in range(3)), "generator"),
        (lambda folder: torch.rand(2).to_sparse(), "a tensor of the kind"),
        (lambda folder: torch.rand(2, device="meta"), "a tensor of the kind"),
        (lambda folder: torch.rand(2).as_subclass(type("Packed", (torch.Tensor,), {})), "Packed"),
        (lambda folder: torch.jit.script(nn.ReLU()), "TorchScript"),
        (lambda folder: memoryview(b"a"), "memoryview"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_read_says_so(tmp_path: Path, make: Callable, named: str) -> None:
    """Deep inside a patch, too."""
    held = make(tmp_path)
    try:
        with pytest.raises(Unreadable, match=named):
            of({"patches": [closing(Plain(held=held))]})
    finally:
        if hasattr(held, "close"):
            held.close()


def test_a_value_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "MOST", 100)
    assert of([0] * 99)
    with pytest.raises(Unreadable, match="over 100 values"):
        of([[] for _ in range(100)])


def test_code_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper in the same file counts, and one in a module that the function imports when called."""
    monkeypatch.syspath_prepend(str(tmp_path))
    patch = "def patch(x):\n    from pack_helper import f\n    return f(x)\n"
    helper = "def f(x):\n    return x + 1\n"
    seen = set()
    for one, two in ((patch, helper), (patch + "A = 1\n", helper), (patch, helper + "A = 1\n")):
        (tmp_path / "pack_main.py").write_text(one)
        (tmp_path / "pack_helper.py").write_text(two)
        for name in ("pack_main", "pack_helper"):
            sys.modules.pop(name, None)
        main = __import__("pack_main")
        __import__("pack_helper")
        seen.add(of(main.patch))
    assert len(seen) == 3


IN_A_PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_digest as t
print(*(t.of(make()) for pair in t.DIFFERENT.values() for make in pair))
"""


def test_the_same_in_every_process() -> None:
    """With other addresses, other orders of sets, and code from source or from a .pyc."""
    tests, root = Path(__file__).parent, Path(__file__).parents[2]
    code = IN_A_PROCESS.format(tests=str(tests), root=str(root))
    said = []
    for seed in "12":
        done = subprocess.run(
            [sys.executable, *(["-B"] if seed == "1" else []), "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert len(said[0]) == 2 * len(DIFFERENT)
    names = [name for name in DIFFERENT for _ in range(2)]
    assert [n for n, a, b in zip(names, *said, strict=True) if a != b] == []
