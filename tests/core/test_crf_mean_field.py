"""Mean field against dense matrices over all pairs of pixels, in float64."""

import pytest
import torch
from torch import Tensor

from em_core.masks.crf import CRFSettings, DenseCRF
from em_core.masks.crf.features import bilateral_features, spatial_features
from em_core.masks.crf.filtering import normalised_filter

WEIGHTS = (3.0, 5.0)


def two_kernels(side: int = 12, seed: int = 0) -> list[Tensor]:
    """Features of the pixels of a random picture, for two kernels with unequal thetas."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, side, side), generator=generator).float()
    smooth = torch.nn.functional.avg_pool2d(image[None], 5, stride=1, padding=2)[0]
    x, y = spatial_features(side, side, 1.0, torch.device("cpu"))
    return [torch.stack([x / 2.5, y / 1.5]), bilateral_features(smooth, 6.0, 20.0)]


def crf_of(features: list[Tensor]) -> DenseCRF:
    """The CRF with a lattice filter for each kernel."""
    filters = [normalised_filter(kernel) for kernel in features]
    return DenseCRF(list(zip(filters, WEIGHTS, strict=True)))


def random_unary(labels: int, n: int, seed: int = 1, strength: float = 1.0) -> Tensor:
    return strength * torch.rand(labels, n, generator=torch.Generator().manual_seed(seed))


def mean_field(unary: Tensor, kernels: list[Tensor], iterations: int) -> Tensor:
    """Q <- softmax(-U + sum_m w_m K_m Q), with dense matrices in float64."""
    unary = unary.double()
    Q = torch.softmax(-unary, dim=0)
    for _ in range(iterations):
        messages = [weight * Q @ K.T for weight, K in zip(WEIGHTS, kernels, strict=True)]
        Q = torch.softmax(-unary + sum(messages), dim=0)
    return Q


def lattice_kernels(features: list[Tensor]) -> list[Tensor]:
    """The lattice filters as dense matrices, found column by column."""
    return [normalised_filter(kernel)(torch.eye(kernel.shape[1])).double() for kernel in features]


def exact_kernels(features: list[Tensor]) -> list[Tensor]:
    """D^-1/2 K D^-1/2 over all pairs, including i = j, in float64."""
    points = [kernel.T.double() for kernel in features]
    kernels = [torch.exp(-0.5 * torch.cdist(f, f).square()) for f in points]
    return [K / (K.sum(0)[:, None] * K.sum(0)).sqrt() for K in kernels]


@pytest.mark.parametrize("labels", (2, 3, 4, 5, 7))
@pytest.mark.parametrize("iterations", (0, 1, 10))
def test_update_is_exact_given_the_filter(labels: int, iterations: int) -> None:
    features = two_kernels()
    unary = random_unary(labels, 144)
    expected = mean_field(unary, lattice_kernels(features), iterations)
    Q = crf_of(features).infer(unary, iterations)
    assert torch.allclose(Q.double(), expected, atol=2e-5)


@pytest.mark.parametrize("labels", (2, 3, 4))
def test_energies_of_any_size(labels: int) -> None:
    """For energies whose exponentials would overflow, the safe softmax gives the same result."""
    features = two_kernels()
    unary = random_unary(labels, 144, strength=400.0)
    expected = mean_field(unary, lattice_kernels(features), 5)
    Q = crf_of(features).infer(unary, 5)
    assert torch.isfinite(Q).all()
    assert torch.allclose(Q.double(), expected, atol=1e-3)


@pytest.mark.parametrize("side", (8, 16, 24))
def test_kernels_have_the_known_error_of_the_lattice(side: int) -> None:
    """Summed over all pairs, the error is about 10% for 2 features and 20% for 5."""
    features = two_kernels(side)
    pairs = zip(lattice_kernels(features), exact_kernels(features), (0.12, 0.3), strict=True)
    for lattice, exact, error in pairs:
        assert float((lattice - exact).abs().sum()) < error * float(exact.sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("labels", (2, 4))
def test_labels_are_near_those_of_all_pairs(labels: int, seed: int) -> None:
    """The update is exact, which leaves the error of the kernels: hardly any label may change."""
    features, unary = two_kernels(24, seed), random_unary(labels, 576, seed + 1)
    unary[0].view(24, 24)[:, :12] -= 0.5
    unary[1].view(24, 24)[:, 12:] -= 0.5
    exact = mean_field(unary, exact_kernels(features), 10)
    Q = crf_of(features).infer(unary, 10)
    changed = Q.argmax(0) != exact.argmax(0)
    assert float(changed.float().mean()) <= 0.02
    assert not (changed & (exact.amax(0) > 0.9)).any()
    assert float((torch.softmax(-unary, 0).argmax(0) != exact.argmax(0)).float().mean()) > 0.1


def test_permuted_labels_permute_the_result() -> None:
    crf = crf_of(two_kernels())
    unary, order = random_unary(4, 144), torch.tensor([2, 0, 3, 1])
    assert torch.allclose(crf.infer(unary[order], 10), crf.infer(unary, 10)[order], atol=1e-5)


def test_marginals_are_probabilities() -> None:
    crf = crf_of(two_kernels())
    Q = crf.infer(random_unary(3, 144), 10)
    assert float(Q.min()) >= -1e-6
    assert torch.allclose(Q.sum(0), torch.ones(144), atol=1e-6)


def test_alone_is_two_labels_each() -> None:
    crf = crf_of(two_kernels())
    logits = torch.randn(3, 144, generator=torch.Generator().manual_seed(0))
    alone = crf.infer_alone(logits, 10)
    for mask, result in zip(logits, alone, strict=True):
        pair = crf.infer(torch.stack([-mask, torch.zeros_like(mask)]), 10)
        assert torch.allclose(pair[0], result, atol=1e-5)


def test_same_input_same_bits() -> None:
    features, unary = two_kernels(), random_unary(3, 144)
    first, second = (crf_of(features).infer(unary, 10) for _ in range(2))
    assert torch.equal(first, second)


def test_without_kernels_the_unary_stays() -> None:
    settings = CRFSettings(gaussian_weight=0.0, bilateral_weight=0.0)
    crf = DenseCRF.of_image(torch.zeros(3, 4, 5), settings)
    unary = random_unary(3, 20)
    assert torch.allclose(crf.infer(unary, 10), torch.softmax(-unary, dim=0), atol=1e-6)


def test_smoothness_kernel_is_kept_by_shape() -> None:
    from em_core.masks.crf.mean_field import CACHED_SHAPES, cached_gaussian, gaussian_filter

    cpu = torch.device("cpu")
    assert gaussian_filter(9, 7, 3.0, cpu) is gaussian_filter(9, 7, 3.0, cpu)
    for width in range(2, 12):
        gaussian_filter(5, width, 3.0, cpu)
    assert cached_gaussian.cache_info().currsize <= CACHED_SHAPES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("labels", (2, 3, 4))
def test_cuda_equals_cpu(labels: int) -> None:
    features, unary = two_kernels(24), random_unary(labels, 576)
    on_cpu = crf_of(features).infer(unary, 10)
    on_gpu = crf_of([kernel.cuda() for kernel in features]).infer(unary.cuda(), 10)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-4)
