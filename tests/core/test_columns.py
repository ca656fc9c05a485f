"""Probabilities of text columns in cross- and joint attention, against loops and dense softmax."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError, einsum, rearrange
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from em_core.model.columns import (
    CHUNK_BYTES,
    column_probabilities,
    logsumexp_over,
    repeat_batch,
    select_columns,
)

COLUMNS = [[[1], [3, 4, 7]], [[], [8]]]
ONE_ROW, SOME_ROWS = 1, 2 * 3 * 10 * 4 * 5  # for 2 samples, 3 heads and 10 others: 1 and 5 rows


def brute_force(q: torch.Tensor, k: torch.Tensor, columns: list, heads: int) -> torch.Tensor:
    """Mean over heads of softmax columns, one sample, head and pixel at a time, in float64."""
    batch, pixels, width = q.shape
    d = width // heads
    out = torch.zeros(batch, len(columns[0]), pixels, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for p in range(pixels):
                probs = torch.softmax(
                    k[b, :, part].double() @ q[b, p, part].double() / d**0.5, dim=0
                )
                for c, positions in enumerate(columns[b]):
                    if positions:
                        out[b, c, p] += probs[list(positions)].mean() / heads
    return out


def dense(
    q: torch.Tensor, k: torch.Tensor, select: torch.Tensor, heads: int, others: torch.Tensor
) -> torch.Tensor:
    """One softmax over text and others that is held whole, in the type of the inputs."""
    keys = torch.cat([k, others], dim=1)
    q, keys = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, keys))
    probs = (einsum(q, keys, "b h q d, b h n d -> b h q n") * q.shape[-1] ** -0.5).softmax(dim=-1)
    weights = repeat_batch(F.pad(select, (0, keys.shape[2] - select.shape[2])), q.shape[0])
    return einsum(probs, weights.to(probs), "b h q n, b k n -> b k q") / heads


def tensors(*sizes: tuple[int, ...], scale: float = 1.0, **of_tensor: object) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    drawn = [scale * torch.randn(size, generator=g, dtype=torch.float64) for size in sizes]
    options = {"dtype": torch.float32} | of_tensor
    requires_grad = options.pop("requires_grad", False)
    return [x.to(**options).requires_grad_(requires_grad) for x in drawn]


def inputs(batch: int = 2, tokens: int = 9, **of_tensor: object) -> list[torch.Tensor]:
    """Queries of 24 pixels, keys of the text and 10 others', 12 channels."""
    return tensors((batch, 24, 12), (batch, tokens, 12), (batch, 10, 12), **of_tensor)


@pytest.mark.parametrize("appended", [0, 2])
def test_cross_attention_equals_brute_force(appended: int) -> None:
    q, k, _ = inputs(tokens=9 + appended)
    maps = column_probabilities(q, k, select_columns(COLUMNS, 9), heads=3)
    torch.testing.assert_close(maps.double(), brute_force(q, k, COLUMNS, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [ONE_ROW, SOME_ROWS, CHUNK_BYTES])
@pytest.mark.parametrize("appended", [0, 2])
def test_joint_attention_equals_brute_force(chunk: int, appended: int) -> None:
    q, k, others = inputs(tokens=9 + appended)
    maps = column_probabilities(q, k, select_columns(COLUMNS, 9), 3, others, chunk)
    expected = brute_force(q, torch.cat([k, others], dim=1), COLUMNS, 3)
    torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("joint", [False, True])
def test_batch_repeated_by_a_host(joint: bool) -> None:
    q, k, others = inputs(batch=4)
    keys = torch.cat([k, others], dim=1) if joint else k
    maps = column_probabilities(q, k, select_columns(COLUMNS, 9), 3, others if joint else None)
    expected = brute_force(q, keys, COLUMNS * 2, 3)
    torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("joint", [False, True])
def test_concepts_that_stand_in_no_prompt_have_zero_maps(joint: bool) -> None:
    q, k, others = inputs(requires_grad=True)
    select = select_columns([[[]], [[]]], 9)
    maps = column_probabilities(q, k, select, 3, others if joint else None)
    maps.sum().backward()
    assert maps.shape == (2, 1, 24)
    assert not maps.any() and not q.grad.any() and not k.grad.any()


def test_width_must_be_a_multiple_of_heads() -> None:
    q, k, others = inputs()
    with pytest.raises(EinopsError):
        column_probabilities(q, k, select_columns(COLUMNS, 9), 5, others)


@pytest.mark.parametrize("chunk", [1, 2 * 2 * 5 * 8 * 2, CHUNK_BYTES])
def test_logsumexp_and_its_gradient(chunk: int) -> None:
    q, keys = tensors((2, 2, 3, 4), (2, 2, 5, 4), dtype=torch.float64, requires_grad=True)
    expected = (q @ keys.mT).logsumexp(dim=-1)
    torch.testing.assert_close(logsumexp_over(q, keys, chunk), expected, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda q, keys: logsumexp_over(q, keys, chunk), (q, keys))


def test_gradient_of_logsumexp_refuses_to_be_differentiated() -> None:
    q, keys = tensors((1, 1, 3, 4), (1, 1, 5, 4), requires_grad=True)
    squares = logsumexp_over(q, keys).square().sum()
    (grad,) = torch.autograd.grad(squares, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("asked", ["q", "k", "others", "all"])
@pytest.mark.parametrize("chunk", [ONE_ROW, SOME_ROWS, CHUNK_BYTES])
def test_joint_gradients_equal_those_of_dense_softmax(chunk: int, asked: str) -> None:
    names = ("q", "k", "others")
    mine = [x.requires_grad_(asked in (n, "all")) for n, x in zip(names, inputs(), strict=True)]
    theirs = [x.detach().double().requires_grad_(x.requires_grad) for x in mine]
    select, (weight,) = select_columns(COLUMNS, 9), tensors((2, 2, 24))
    (column_probabilities(*mine[:2], select, 3, mine[2], chunk) * weight).sum().backward()
    (dense(*theirs[:2], select, 3, theirs[2]) * weight).sum().backward()
    for x, reference in zip(mine, theirs, strict=True):
        assert (x.grad is None) == (reference.grad is None)
        if x.grad is not None:
            torch.testing.assert_close(x.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [200.0, -200.0])
def test_large_logits(value: float) -> None:
    """The first half of the pixels gets logits of `value` over the text, the other of -`value`."""
    q = torch.ones(1, 4, 4)
    q[:, 2:] *= -1
    k, others = torch.full((1, 3, 4), value / 2), torch.zeros(1, 5, 4)
    leaves = [x.requires_grad_() for x in (q, k, others)]
    maps = column_probabilities(q, k, select_columns([[[0]]], 3), 1, others, ONE_ROW)
    maps.sum().backward()
    high, low = [1 / 3] * 2, [0.0] * 2
    expected = torch.tensor([[high + low if value > 0 else low + high]])
    # A float32 of 200 is good to 1e-5, and the exponential hands that on as a relative error.
    torch.testing.assert_close(maps, expected, atol=0, rtol=3e-5)
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("scale", [200.0, -200.0])
def test_logsumexp_of_large_logits(scale: float) -> None:
    q, keys = torch.full((1, 1, 3, 1), scale), torch.ones(1, 1, 5, 1)
    expected = torch.full((1, 1, 3), scale) + torch.tensor(5.0).log()
    torch.testing.assert_close(logsumexp_over(q, keys, ONE_ROW), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_that_of_the_inputs(dtype: torch.dtype) -> None:
    mine = inputs(dtype=dtype, requires_grad=True, scale=3.0)
    theirs = [x.detach().double().requires_grad_() for x in mine]
    select = select_columns(COLUMNS, 9)
    maps = column_probabilities(*mine[:2], select, 3, mine[2], SOME_ROWS)
    reference = dense(*theirs[:2], select, 3, theirs[2])
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), reference, atol=1e-6, rtol=1e-5)
    maps.sum().backward()
    reference.sum().backward()
    for x, expected in zip(mine, theirs, strict=True):
        assert x.grad.dtype == dtype
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(x.grad.double(), expected.grad, atol=1e-5, rtol=rtol)


def test_autocast_does_not_lower_the_precision() -> None:
    select, runs = select_columns(COLUMNS, 9), []
    for enabled in (False, True):
        leaves = inputs(requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            maps = column_probabilities(*leaves[:2], select, 3, leaves[2], SOME_ROWS)
        maps.sum().backward()
        runs.append([maps.detach(), *(x.grad for x in leaves)])
    for plain, cast in zip(*runs, strict=True):
        assert torch.equal(plain, cast)


class Allocations(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation puts out, and the most alive."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, tree_leaves(out)):
            self.note(x.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())
        self.largest = max(self.largest, storage.nbytes())

    def change(self, by: int) -> None:
        self.alive += by
        self.peak = max(self.peak, self.alive)


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Memory that autograd saves, by address: the bytes of each distinct storage."""
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def test_memory_of_4096_pixels() -> None:
    """No pass makes a tensor above the chunk or an input, nor holds two chunks; dense ones are 65."""
    pixels, heads, width, chunk = 4096, 4, 64, 4 * 2**20
    leaves = tensors((1, pixels, width), (1, 77, width), (1, pixels, width), requires_grad=True)
    select = select_columns([[[3], [5, 6]]], 77)
    with Allocations() as joint, saved_bytes() as saved:
        column_probabilities(*leaves[:2], select, heads, leaves[2], chunk).sum().backward()
    on_meta = [x.detach().to("meta").requires_grad_() for x in leaves]
    with Allocations() as whole:
        dense(*on_meta[:2], select.to("meta"), heads, on_meta[2]).sum().backward()
    inputs_bytes = max(x.nbytes for x in leaves)
    assert joint.largest <= max(chunk, inputs_bytes)
    assert joint.peak <= chunk + 9 * inputs_bytes
    assert sum(saved.values()) <= 4 * inputs_bytes
    assert whole.largest == heads * pixels * (pixels + 77) * 4 > 64 * chunk
