"""Every path of the filter, forced on the CPU, and which one is chosen for each device."""

import itertools

import pytest
import torch
from test_crf_lattice import dictionary_filter, plain_filter, random_features
from test_crf_mean_field import crf_of, lattice_kernels, random_unary, two_kernels
from test_crf_mean_field import mean_field as dense_mean_field
from torch import Tensor

from em_core.masks.crf import CUTLER, DenseCRF, filtering, mean_field, paths
from em_core.masks.crf.filtering import row_sums
from em_core.masks.crf.lattice import build_lattice
from em_core.masks.crf.paths import FilterPath, choose_path, has_mkl_products

SUMS = ("bag", "product") if has_mkl_products() else ("bag",)
CHANNELS = (1, 2, 3, 4, 5)


def all_paths(channels: int) -> list[FilterPath]:
    """Every combination of operations, without and with padding to a multiple of four columns."""
    columns = sorted({channels, -(-channels // 4) * 4})
    options = (columns, SUMS, ("sums", "copies"), ("product", "reduction"))
    return [FilterPath(*chosen) for chosen in itertools.product(*options)]


def case_id(value: object) -> str:
    return "-".join(map(str, vars(value).values())) if isinstance(value, FilterPath) else str(value)


CASES = [(channels, path) for channels in CHANNELS for path in all_paths(channels)]
for_all_cases = pytest.mark.parametrize(("channels", "path"), CASES, ids=case_id)


def pad(values: Tensor, path: FilterPath) -> Tensor:
    return torch.nn.functional.pad(values, (0, path.columns - values.shape[1]))


def assert_equal_and_exact(result: Tensor, default: Tensor, exact: Tensor, error: float) -> None:
    """The result is near that of the default path, and both are near that in float64."""
    assert torch.allclose(result, default, rtol=1e-5, atol=1e-5)
    for found in (result, default):
        assert torch.allclose(found.double(), exact, rtol=0, atol=error)


@for_all_cases
@pytest.mark.parametrize("d", (2, 5))
def test_filter(channels: int, path: FilterPath, d: int) -> None:
    features = random_features(d, 100, spread=1.0)
    values = torch.randn(100, channels, generator=torch.Generator().manual_seed(1))
    K = plain_filter(build_lattice(features))
    exact = torch.from_numpy(dictionary_filter(features, values.double().numpy()))
    result = K(pad(values, path), path)[:, :channels]
    assert_equal_and_exact(result, K(values), exact, 2e-5)


@pytest.mark.parametrize("path", [path for path in all_paths(1) if path.columns == 1], ids=case_id)
def test_row_sums(path: FilterPath) -> None:
    """The normalisation of a filter that is being built; it always has one column."""
    features = random_features(3, 100, spread=1.0)
    lattice = build_lattice(features)
    exact = torch.from_numpy(dictionary_filter(features, torch.ones(100, 1).double().numpy()))
    sums = row_sums(lattice, lattice.barycentric.t().contiguous(), path)
    assert torch.allclose(sums.double(), exact, rtol=1e-5)


@for_all_cases
def test_inference(channels: int, path: FilterPath) -> None:
    features, unary = two_kernels(), random_unary(channels + 1, 144)
    crf, exact = crf_of(features), dense_mean_field(unary, lattice_kernels(features), 10)
    assert_equal_and_exact(crf.infer(unary, 10, path), crf.infer(unary, 10), exact, 2e-5)


@for_all_cases
def test_inference_with_large_energies(channels: int, path: FilterPath) -> None:
    """These take the softmax that is safe for logits of any size."""
    features, unary = two_kernels(), random_unary(channels + 1, 144, strength=400.0)
    exact = dense_mean_field(unary, lattice_kernels(features), 5)
    result = crf_of(features).infer(unary, 5, path)
    assert torch.allclose(result.double(), exact, atol=1e-3)


@for_all_cases
def test_inference_alone(channels: int, path: FilterPath) -> None:
    features = two_kernels()
    logits = torch.randn(channels, 144, generator=torch.Generator().manual_seed(0))
    pairs = [torch.stack([-mask, torch.zeros_like(mask)]) for mask in logits]
    kernels, crf = lattice_kernels(features), crf_of(features)
    exact = torch.stack([dense_mean_field(pair, kernels, 10)[0] for pair in pairs])
    result = crf.infer_alone(logits, 10, path)
    assert_equal_and_exact(result, crf.infer_alone(logits, 10), exact, 2e-5)


@pytest.mark.parametrize(
    ("device", "mkl", "channels", "expected"),
    (
        ("cpu", True, 1, FilterPath(1, "product", "copies", "product")),
        ("cpu", True, 2, FilterPath(4, "product", "sums", "product")),
        ("cpu", True, 4, FilterPath(4, "product", "sums", "product")),
        ("cpu", True, 5, FilterPath(8, "product", "sums", "product")),
        ("cpu", False, 1, FilterPath(1, "bag", "copies", "product")),
        ("cpu", False, 3, FilterPath(3, "bag", "copies", "product")),
        ("cuda", True, 1, FilterPath(1, "bag", "copies", "reduction")),
        ("cuda", False, 3, FilterPath(3, "bag", "copies", "reduction")),
        ("mps", False, 3, FilterPath(3, "bag", "copies", "reduction")),
    ),
)
def test_choice(
    device: str, mkl: bool, channels: int, expected: FilterPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "has_mkl_products", lambda: mkl)
    assert choose_path(torch.device(device), channels) == expected


@pytest.mark.parametrize("system", ("linux", "win32"))
@pytest.mark.parametrize("mkl", (True, False))
def test_mkl_multiplies_sparse_matrices_outside_windows(
    system: str, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths.sys, "platform", system)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert has_mkl_products() == (mkl and system == "linux")


@pytest.mark.parametrize("alone", (True, False))
def test_one_choice_per_inference(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    crf, chosen = crf_of(two_kernels()), []

    def recorded(device: torch.device, channels: int) -> FilterPath:
        chosen.append(channels)
        return choose_path(device, channels)

    monkeypatch.setattr(filtering, "choose_path", recorded)
    monkeypatch.setattr(mean_field, "choose_path", recorded)
    unary = random_unary(3, 144)
    _ = crf.infer_alone(unary, 10) if alone else crf.infer(unary, 10)
    assert chosen == [3 if alone else 2]


@pytest.mark.parametrize("labels", (2, 4))
def test_without_mkl(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole solve, lattices included, on a CPU without MKL's products."""
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) * 255
    unary = random_unary(labels, 600)
    results = []
    for mkl in (has_mkl_products(), False):
        monkeypatch.setattr(paths, "has_mkl_products", lambda mkl=mkl: mkl)
        mean_field.cached_gaussian.cache_clear()
        results.append(DenseCRF.of_image(image, CUTLER).infer(unary, 10))
    mean_field.cached_gaussian.cache_clear()
    assert torch.allclose(*results, atol=1e-5)
