"""The two backends give the same marginals."""

import importlib.util
from dataclasses import replace

import photos
import pytest
import torch
from torch import Tensor

from em_core.masks.crf import CUTLER, DEMO, DIFFUMASK, CRFSettings, MaskRefiner, joint_unary

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf is not installed: pip install pydensecrf2, where it builds",
)
SIZES = ((512, 512), (511, 333), (253, 401))
GRID = [(name, size, labels) for name in photos.NAMES for size in SIZES for labels in range(2, 6)]
# Each photo once at each size, each number of labels three times.
SHORT = [case for i, case in enumerate(GRID) if i % 4 == (i // 4) % 4]


def assert_equal_backends(image: Tensor, masks: Tensor, settings: CRFSettings = CUTLER) -> None:
    """At most 0.001% of labels differ, and marginals by less than 1e-6 on average."""
    unary = joint_unary(masks, settings.unary_strength)
    ours = MaskRefiner(image, settings).infer(unary)
    theirs = MaskRefiner(image, replace(settings, backend="pydensecrf")).infer(unary)
    assert float((ours.argmax(0) != theirs.argmax(0)).float().mean()) <= 1e-5
    assert float((ours - theirs).abs().mean()) < 1e-6


def scene(height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Coloured discs on a noisy gradient, and ragged masks of them.

    The masks are soft so that no two claim a pixel equally. Rounding would decide such a tie, and
    mean field would amplify the decision.
    """
    generator = torch.Generator().manual_seed(height + width + count)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([0.3 + 0.4 * x, 0.5 * y, 0.6 - 0.3 * x])
    masks = []
    for i in range(count):
        disc = (x - 0.2 - 0.6 * i / count).square() + (y - 0.5).square() < 0.03
        image = torch.where(disc, torch.rand(3, 1, 1, generator=generator), image)
        ragged = disc ^ (torch.rand(height, width, generator=generator) < 0.15)
        masks.append(ragged * (0.7 + 0.3 * torch.rand(height, width, generator=generator)))
    noise = 0.03 * torch.randn(3, height, width, generator=generator)
    return (image + noise).clamp(0, 1), torch.stack(masks)


@photos.needed
@pytest.mark.parametrize(("name", "size", "labels"), SHORT)
def test_photos(name: str, size: tuple[int, int], labels: int) -> None:
    assert_equal_backends(*photos.read_photo(name, size, labels - 1))


@pytest.mark.slow
@photos.needed
@pytest.mark.parametrize(("name", "size", "labels"), [case for case in GRID if case not in SHORT])
def test_photos_full_grid(
    name: str, size: tuple[int, int], labels: int, request: pytest.FixtureRequest
) -> None:
    if "slow" not in str(request.config.getoption("-m")):
        pytest.skip("run with -m slow")
    assert_equal_backends(*photos.read_photo(name, size, labels - 1))


@pytest.mark.parametrize("settings", (CUTLER, DIFFUMASK, DEMO))
@pytest.mark.parametrize("size", ((64, 64), (97, 131), (1, 50), (50, 1), (1, 1)))
def test_synthetic(settings: CRFSettings, size: tuple[int, int]) -> None:
    for labels in (2, 3, 4, 5, 6):
        assert_equal_backends(*scene(*size, labels - 1), settings)


@pytest.mark.parametrize(
    "changes",
    (
        {"iterations": 0},
        {"iterations": 1},
        {"gaussian_weight": 0.0},
        {"bilateral_weight": 0.0},
        {"gaussian_weight": 60.0, "bilateral_weight": 70.0},
        {"bilateral_theta_rgb": 0.5},
        {"gaussian_theta_xy": 400.0, "bilateral_theta_xy": 900.0},
        {"unary_strength": 8.0},
        {"joint": False},
    ),
    ids=str,
)
def test_unusual_numbers(changes: dict[str, float]) -> None:
    assert_equal_backends(*scene(60, 80, 3), replace(CUTLER, **changes))


def test_refined_masks_alone_and_jointly() -> None:
    image, masks = scene(70, 90, 3)
    for joint in (True, False):
        settings = replace(CUTLER, joint=joint, working_size=64)
        ours = MaskRefiner(image, settings)(masks)
        theirs = MaskRefiner(image, replace(settings, backend="pydensecrf"))(masks)
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_one_colour() -> None:
    masks = scene(80, 80, 2)[1]
    assert_equal_backends(torch.full((3, 80, 80), 0.4), masks)
