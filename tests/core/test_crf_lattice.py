"""The permutohedral lattice against its definition, and the filter against one over a dictionary."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from em_core.errors import UserError
from em_core.masks.crf.embedding import embed, scale_factors
from em_core.masks.crf.filtering import (
    LatticeFilter,
    normalised_filter,
    slice_sums,
    splat_sums,
)
from em_core.masks.crf.lattice import Lattice, build_lattice, sort_stable

DIMENSIONS = (1, 2, 3, 5, 7)


def random_features(d: int, n: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * d)
    thetas = 0.5 + torch.rand(d, 1, generator=generator)
    return torch.randn(d, n, generator=generator) * spread / thetas


def corners(features: Tensor) -> np.ndarray:
    """Integer coordinates of each simplex's corners, (n, classes, classes), recovered from `embed`."""
    d = len(features)
    simplices = embed(features)
    cell, rank = simplices.cell.long().numpy(), simplices.rank.long().numpy()
    found = np.zeros((features.shape[1], d + 1, d + 1), dtype=np.int64)
    for r in range(d + 1):
        found[:, r, :d] = ((d + 1) * (cell - (rank > d - r)) + r).T
        found[:, r, d] = -found[:, r, :d].sum(axis=1)
    return found


def plain_filter(lattice: Lattice) -> LatticeFilter:
    """The filter without normalisation: K itself, as the lattice approximates it."""
    slice_weights = (lattice.barycentric.t() * lattice.alpha).contiguous()
    return LatticeFilter(
        lattice, splat_sums(lattice, lattice.barycentric), slice_sums(lattice, slice_weights)
    )


def elevation(d: int) -> np.ndarray:
    """E of Adams, Baek, Davis (2010), p. 5, with the scale of p. 6, written out as a matrix."""
    triangle = np.zeros((d + 1, d))
    for j in range(d):
        triangle[: j + 1, j] = 1
        triangle[j + 1, j] = -(j + 1)
    lengths = 1 / np.sqrt([(j + 1) * (j + 2) for j in range(d)])
    return triangle * lengths * np.sqrt(2 / 3) * (d + 1)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_scale_factors(d: int) -> None:
    columns = np.abs(elevation(d)[0])
    assert scale_factors(d) == pytest.approx(columns.tolist(), rel=1e-6)


@pytest.mark.parametrize("d", DIMENSIONS)
def test_corners_are_the_simplex_around_the_point(d: int) -> None:
    """The corners are one lattice point of each remainder, and the point is a convex sum of them."""
    features = random_features(d, 300)
    found = corners(features)
    weights = embed(features).weights.T.double().numpy()
    assert (found.sum(axis=2) == 0).all()
    for r in range(d + 1):
        assert (found[:, r] % (d + 1) == r).all()
    assert weights.min() >= -1e-5
    assert weights.sum(axis=1) == pytest.approx(1, abs=1e-5)
    points = features.double().numpy().T @ elevation(d).T
    combined = np.einsum("nr,nrk->nk", weights, found)
    assert combined == pytest.approx(points, abs=1e-4)
    # The corners of a simplex of this lattice differ by at most d + 1 in every coordinate.
    assert np.ptp(found, axis=1).max() <= d + 1


@pytest.mark.parametrize("d", DIMENSIONS)
def test_tables_agree_with_a_dictionary_of_vertices(d: int) -> None:
    features = random_features(d, 400, spread=1.0)
    lattice = build_lattice(features)
    found = corners(features)
    number: dict[tuple[int, ...], int] = {}
    for point, r in itertools.product(range(400), range(d + 1)):
        vertex = tuple(found[point, r].tolist())
        assert number.setdefault(vertex, int(lattice.vertex[point, r])) == lattice.vertex[point, r]
    m = len(number)
    assert sorted(number.values()) == list(range(m))
    assert len(lattice.splat_start) == m + 2
    groups = [
        lattice.splat_point.view(-1)[start:end].tolist()
        for start, end in itertools.pairwise(lattice.splat_start)
    ]
    by_number = {i: vertex for vertex, i in number.items()}
    for i in range(m):
        assert groups[i] == sorted(np.nonzero((found == by_number[i]).all(axis=2))[0].tolist())
    assert groups[m] == []
    for j in range(d + 1):
        step = np.full(d + 1, -1)
        step[j] = d
        for vertex, i in number.items():
            assert int(lattice.before[j, i]) == number.get(tuple((vertex + step).tolist()), m)
            assert int(lattice.after[j, i]) == number.get(tuple((vertex - step).tolist()), m)
        assert int(lattice.before[j, m]) == m == int(lattice.after[j, m])


def dictionary_filter(features: Tensor, values: np.ndarray) -> np.ndarray:
    """Splat, blur and slice in float64, with a dictionary of vertices for the lattice."""
    d, n = features.shape
    found, weights = corners(features), embed(features).weights.double().numpy().T
    on_lattice: dict[tuple[int, ...], np.ndarray] = {}
    for i, r in itertools.product(range(n), range(d + 1)):
        vertex = tuple(found[i, r].tolist())
        on_lattice[vertex] = on_lattice.get(vertex, 0) + weights[i, r] * values[i]
    for j in range(d + 1):
        step = np.full(d + 1, -1)
        step[j] = d
        on_lattice = {
            vertex: value
            + 0.5 * on_lattice.get(tuple((vertex + step).tolist()), 0)
            + 0.5 * on_lattice.get(tuple((vertex - step).tolist()), 0)
            for vertex, value in on_lattice.items()
        }
    alpha = 1 / (1 + 2.0**-d)
    return alpha * np.array(
        [
            sum(weights[i, r] * on_lattice[tuple(found[i, r].tolist())] for r in range(d + 1))
            for i in range(n)
        ]
    )


@pytest.mark.parametrize("d", DIMENSIONS)
@pytest.mark.parametrize("channels", (1, 2, 3, 4, 5))
def test_filter_is_splat_blur_slice(d: int, channels: int) -> None:
    features = random_features(d, 150, spread=1.0)
    values = torch.randn(150, channels, generator=torch.Generator().manual_seed(1))
    expected = dictionary_filter(features, values.double().numpy())
    assert plain_filter(build_lattice(features))(values).numpy() == pytest.approx(
        expected, abs=2e-5
    )


@pytest.mark.parametrize("d", (2, 5))
def test_normalised_filter_is_symmetrically_scaled(d: int) -> None:
    features = random_features(d, 200, spread=1.0)
    lattice = build_lattice(features)
    K = plain_filter(lattice)(torch.eye(200)).double()
    D = K.sum(dim=1)
    expected = K / (D[:, None] * D[None, :]).sqrt()
    assert torch.allclose(normalised_filter(features)(torch.eye(200)).double(), expected, atol=1e-5)


@pytest.mark.parametrize(("d", "error"), ((1, 0.12), (2, 0.12), (3, 0.15), (5, 0.2)))
def test_filter_is_near_the_gaussian(d: int, error: float) -> None:
    """The row-normalised filter of a smooth signal at dense points, against the sum over all pairs.

    The lattice is an approximation: its kernel is a spline of finite support, truncated where there
    are no points. The bound is on its known mean error, not on rounding.
    """
    n = 600
    features = random_features(d, n, spread=0.7)
    signal = torch.sin(features.sum(dim=0, keepdim=True).T)
    values = torch.cat([signal, torch.ones_like(signal)], dim=1)
    got = plain_filter(build_lattice(features))(values)
    exact_K = torch.exp(-0.5 * torch.cdist(features.T.double(), features.T.double()).square())
    exact = exact_K @ values.double()
    difference = got[:, 0] / got[:, 1] - exact[:, 0] / exact[:, 1]
    assert float(difference.abs().mean()) < error * float(signal.std())


def test_equal_points_share_their_simplex() -> None:
    """For n equal points, K 1 is n times the weight of a point with itself, which is less than 1."""
    lattice = build_lattice(torch.full((5, 64), 0.3))
    assert (lattice.vertex == lattice.vertex[0]).all()
    alone = plain_filter(build_lattice(torch.full((5, 1), 0.3)))(torch.ones(1, 1))
    together = plain_filter(lattice)(torch.ones(64, 1))
    assert torch.allclose(together, 64 * alone.expand(64, 1), rtol=1e-5)


def test_wide_spread_takes_64_bit_keys() -> None:
    """Distant points do not interact: each keeps its own value, whatever the type of its key."""
    features = random_features(5, 200, spread=200.0)
    normalised = normalised_filter(features)
    values = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(normalised(values), values, atol=1e-5)


@pytest.mark.parametrize("spread", (1e7, float("inf")))
def test_too_small_thetas_are_refused(spread: float) -> None:
    with pytest.raises(UserError, match="thetas are too small"):
        build_lattice(random_features(5, 10, spread=spread))


@pytest.mark.parametrize("shape", ((0, 4), (8, 4), (2, 0)))
def test_features_without_a_lattice_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="Expected 1 to 7"):
        build_lattice(torch.zeros(shape))


def test_keys_too_wide_to_pack_are_sorted_alike() -> None:
    keys = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    ordered, place = sort_stable(keys)
    wide = keys + (1 << 62)
    wide_ordered, wide_place = sort_stable(wide)
    expected = np.argsort(keys.numpy(), kind="stable")
    assert place.tolist() == wide_place.tolist() == expected.tolist()
    assert torch.equal(ordered, keys[place])
    assert torch.equal(wide_ordered, wide[place])
