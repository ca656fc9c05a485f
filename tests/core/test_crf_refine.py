"""The refiner on masks: what it keeps, what it repairs, and what it rejects."""

import os
import sys
from copy import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from em_core.errors import UserError
from em_core.masks.crf import (
    CUTLER,
    DEMO,
    DIFFUMASK,
    CRFSettings,
    MaskRefiner,
    joint_unary,
    labels,
    memory,
)
from em_core.masks.crf.mean_field import cached_gaussian
from em_core.masks.measures import iou
from em_core.settings import from_json


def two_squares(height: int = 64, width: int = 64) -> tuple[Tensor, Tensor]:
    """A picture of a red and a blue rectangle on green, and their true masks."""
    masks = torch.zeros(2, height, width)
    masks[0, height // 8 : height // 2, width // 8 : width // 2] = 1
    masks[1, height // 2 : -height // 8, width // 2 : -width // 8] = 1
    colours = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    image = torch.einsum("khw,kc->chw", masks, colours)
    green = torch.tensor([0.2, 0.6, 0.2])[:, None, None]
    return torch.where(masks.any(dim=0), image, green), masks


def blurred(masks: Tensor, noise: float = 0.0) -> Tensor:
    """Masks as if from a coarse map: pooled to an eighth, enlarged, thresholded, some pixels flipped."""
    small = torch.nn.functional.avg_pool2d(masks[None], 8, stride=8)
    large = torch.nn.functional.interpolate(small, masks.shape[-2:], mode="bilinear")[0]
    flipped = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0)) < noise
    return ((large > 0.4) ^ flipped).float()


@pytest.mark.parametrize("joint", (True, False))
def test_ragged_masks_are_repaired(joint: bool) -> None:
    image, truth = two_squares()
    ragged = blurred(truth, 0.1)
    refined = labels(MaskRefiner(image, replace(DEMO, joint=joint))(ragged), joint)
    before, after = iou(ragged > 0.5, truth > 0.5), iou(refined, truth > 0.5)
    assert float(before.max()) < 0.75
    assert float(after.min()) > 0.97


def test_one_mask_jointly_is_one_mask_alone() -> None:
    image, truth = two_squares()
    ragged = blurred(truth, 0.1)[:1]
    jointly = MaskRefiner(image, DEMO)(ragged)
    assert torch.allclose(
        jointly, MaskRefiner(image, replace(DEMO, joint=False))(ragged), atol=1e-5
    )


def test_joint_masks_do_not_overlap() -> None:
    image, truth = two_squares()
    overlapping = torch.cat([truth, truth.flip(-1), truth.flip(-2)])
    marginals = MaskRefiner(image, DEMO)(overlapping)
    assert float(marginals.sum(dim=0).max()) <= 1 + 1e-5
    assert int(labels(marginals).sum(dim=0).max()) == 1


def test_the_order_of_masks_does_not_matter() -> None:
    image, truth = two_squares()
    ragged, refiner = blurred(truth, 0.1), MaskRefiner(image, DEMO)
    assert torch.allclose(refiner(ragged.flip(0)), refiner(ragged).flip(0), atol=1e-5)


def test_unary_of_the_paper() -> None:
    """CutLER: binary masks give 0.731 and 0.269, that is, energies of 0.313 and 1.313."""
    unary = joint_unary(torch.tensor([[[0.0, 1.0]]]), strength=1.0)
    assert torch.allclose(unary[0, 0], torch.tensor([1.3133, 0.3133]), atol=1e-4)
    assert torch.allclose(unary[1, 0], torch.tensor([0.3133, 1.3133]), atol=1e-4)


def test_zero_iterations_give_the_softmax_of_the_unary() -> None:
    image, truth = two_squares()
    marginals = MaskRefiner(image, replace(CUTLER, iterations=0))(truth)
    expected = torch.softmax(torch.stack([*truth, 1 - truth.amax(0)]), dim=0)[:-1]
    assert torch.allclose(marginals, expected, atol=1e-6)


def test_mixed_precision_around_it_changes_nothing() -> None:
    image, truth = two_squares()
    alone = MaskRefiner(image, DEMO)(truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = MaskRefiner(image, DEMO)(truth.requires_grad_())
    assert torch.equal(within, alone)
    assert not within.requires_grad


@pytest.mark.parametrize("value", (0.0, 1.0))
@pytest.mark.parametrize("joint", (True, False))
def test_empty_and_full_masks_stay(value: float, joint: bool) -> None:
    image = two_squares()[0]
    masks = torch.full((1, 64, 64), value)
    marginals = MaskRefiner(image, replace(CUTLER, joint=joint))(masks)
    assert ((marginals > 0.5) == (value > 0.5)).all()


@pytest.mark.parametrize("size", ((1, 40), (40, 1), (1, 1), (3, 2), (37, 53)))
def test_pictures_of_any_shape(size: tuple[int, int]) -> None:
    masks = torch.zeros(2, *size)
    masks[0, : (size[0] + 1) // 2, : (size[1] + 1) // 2] = 1
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    marginals = MaskRefiner(image)(masks)
    assert marginals.shape == masks.shape
    assert torch.isfinite(marginals).all()


def test_one_colour_is_as_if_colour_did_not_matter() -> None:
    """A black picture gives the same result as noise with a theta_rgb that ignores colour."""
    ragged = blurred(two_squares()[1], 0.1)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    blind = MaskRefiner(noise, replace(DEMO, bilateral_theta_rgb=1e7))(ragged)
    assert torch.allclose(MaskRefiner(torch.zeros(3, 64, 64), DEMO)(ragged), blind, atol=1e-2)


@pytest.mark.parametrize("size", ((8, 8), (16, 16), (128, 128), (128, 32)))
def test_masks_of_another_size_are_resized(size: tuple[int, int]) -> None:
    image, truth = two_squares()
    small = torch.nn.functional.interpolate(truth[None], size, mode="bilinear", antialias=True)[0]
    refined = labels(MaskRefiner(image, DEMO)(small))
    assert refined.shape == truth.shape
    assert float(iou(refined, truth > 0.5).min()) > 0.9


@pytest.mark.parametrize(
    "kind", (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64)
)
def test_masks_of_any_type(kind: torch.dtype) -> None:
    image, truth = two_squares()
    refiner = MaskRefiner(image, DEMO)
    assert torch.equal(refiner(truth.to(kind)), refiner(truth))


def test_pictures_in_8_bits_equal_those_in_floats() -> None:
    eight = torch.randint(
        0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    masks = two_squares(32, 32)[1]
    assert torch.equal(MaskRefiner(eight)(masks), MaskRefiner(eight / 255)(masks))


def test_working_size() -> None:
    """Solving at a quarter of the size, with lengths scaled to match, hardly changes the result."""
    image, truth = two_squares(256, 200)
    ragged = blurred(truth, 0.1)
    settings = replace(DEMO, working_size=64)
    refiner = MaskRefiner(image, settings)
    assert tuple(refiner.image.shape) == (3, 64, 50)
    refined = labels(refiner(ragged))
    assert refined.shape == truth.shape
    assert float(iou(refined, truth > 0.5).min()) > 0.93
    assert MaskRefiner(image, replace(DEMO, working_size=999)).image.shape == image.shape


def test_lengths_scale_with_the_picture() -> None:
    """Doubling the sides doubles the thetas; an oblong picture has those of its area."""
    assert CUTLER.scale(480, 480) == pytest.approx(1)
    assert CUTLER.scale(960, 960) == pytest.approx(2)
    assert CUTLER.scale(240, 960) == pytest.approx(1)
    assert DEMO.scale(64, 64) == pytest.approx(1)


def test_enlarged_picture_gives_enlarged_result() -> None:
    image, truth = two_squares()
    ragged = blurred(truth, 0.1)
    large_image, large_ragged = (
        maps.repeat_interleave(2, -1).repeat_interleave(2, -2) for maps in (image, ragged)
    )
    small = MaskRefiner(image, DEMO)(ragged)
    large = MaskRefiner(large_image, DEMO)(large_ragged)
    agree = (labels(large)[:, ::2, ::2] == labels(small)).float().mean()
    assert float(agree) > 0.99


def test_published_numbers() -> None:
    """Those of CutLER's crf.py and of DiffuMask."""
    numbers = ("iterations", "gaussian_theta_xy", "gaussian_weight", "bilateral_theta_xy")
    numbers += ("bilateral_theta_rgb", "bilateral_weight")
    assert [getattr(CUTLER, name) for name in numbers] == [10, 3, 7, 50, 5, 10]
    assert [getattr(DIFFUMASK, name) for name in numbers] == [5, 3, 3, 80, 13, 10]


def test_settings_survive_json() -> None:
    assert from_json(CRFSettings, asdict(DEMO)) == DEMO


def test_lattice_is_built_once_and_not_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from em_core.masks.crf import mean_field

    built = []
    real = mean_field.bilateral_features
    monkeypatch.setattr(
        mean_field, "bilateral_features", lambda *args: built.append(1) or real(*args)
    )
    image, truth = two_squares()
    refiner = MaskRefiner(image, DEMO)
    assert not built
    first = refiner(truth)
    assert torch.equal(refiner(truth), first)
    refiner(truth[:1])
    assert len(built) == 1


def test_refiners_of_several_pictures_are_independent() -> None:
    """They share the smoothness kernel; each gives what it gives alone, in any order of calls."""
    image, truth = two_squares()
    images, masks = (image, image.flip(-1)), (truth, truth.flip(-2))
    alone = []
    for picture, stack in zip(images, masks, strict=True):
        cached_gaussian.cache_clear()
        alone.append(MaskRefiner(picture, DEMO)(stack))
    refiners = [MaskRefiner(picture, DEMO) for picture in images]
    for i in (0, 1, 1, 0):
        assert torch.equal(refiners[i](masks[i]), alone[i])


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"iterations": -1}, "Bad CRF setting iterations. Expected a whole number from 0"),
        ({"iterations": 2.5}, "iterations. Expected a whole number"),
        (
            {"gaussian_theta_xy": 0.0},
            "gaussian_theta_xy. Expected a number greater than 0, got 0.0",
        ),
        ({"bilateral_theta_xy": -3.0}, "bilateral_theta_xy"),
        ({"bilateral_theta_rgb": float("nan")}, "bilateral_theta_rgb"),
        ({"bilateral_theta_rgb": float("inf")}, "bilateral_theta_rgb"),
        ({"gaussian_weight": -1.0}, "gaussian_weight"),
        ({"unary_strength": float("nan")}, "unary_strength"),
        (
            {"gaussian_theta_xy": None},
            "gaussian_theta_xy. Expected a number greater than 0, got None",
        ),
        ({"working_size": 0}, "working_size"),
        ({"working_size": 16.5}, "working_size. Expected a whole number"),
        ({"working_size": "256"}, "working_size. Expected a whole number"),
        ({"reference_side": 0.0}, "reference_side"),
        ({"backend": "matlab"}, "backend. Expected 'torch' or 'pydensecrf', got 'matlab'"),
    ),
    ids=str,
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    """The values are set behind the back of the tests' type checks, which users do not have."""
    settings = copy(CUTLER)
    for name, value in changes.items():
        object.__setattr__(settings, name, value)
    with pytest.raises(UserError, match=message):
        settings.__post_init__()


def test_thetas_too_small_for_the_lattice_are_refused() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="thetas are too small"):
        MaskRefiner(image, replace(CUTLER, bilateral_theta_rgb=1e-9))(torch.zeros(1, 32, 32))


@pytest.mark.parametrize(
    ("image", "message"),
    (
        (torch.zeros(1, 8, 8), r"Expected RGB of shape \(3, height, width\), got \(1, 8, 8\)"),
        (torch.zeros(8, 8), "Expected RGB"),
        (torch.zeros(3, 0, 8), "Expected RGB"),
        (torch.full((3, 8, 8), 255.0), "0..1, got 255 to 255"),
        (torch.full((3, 8, 8), float("nan")), "Bad image. Expected values in 0..1, got NaN"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "Expected floats in 0..1 or uint8"),
    ),
    ids=str,
)
def test_bad_images_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskRefiner(image)


@pytest.mark.parametrize(
    ("masks", "message"),
    (
        (torch.zeros(0, 8, 8), "Expected at least one"),
        (torch.zeros(8, 8), "Expected at least one, of shape"),
        (
            torch.full((1, 8, 8), float("nan")),
            "Bad masks. Expected values in 0..1, got NaN",
        ),
        (torch.full((1, 8, 8), 255, dtype=torch.uint8), "got 255 to 255"),
        (torch.full((1, 8, 8), float("inf")), "got inf"),
        (torch.full((1, 8, 8), -0.1), "got -0.1"),
    ),
    ids=str,
)
def test_bad_masks_are_refused(masks: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskRefiner(torch.zeros(3, 8, 8))(masks)


def test_a_picture_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: 1 << 20)
    with pytest.raises(
        UserError, match=r"4096 pixels needs up to .* GB of memory, but cpu has .* working size"
    ):
        MaskRefiner(torch.zeros(3, 64, 64))
    assert MaskRefiner(torch.zeros(3, 64, 64), replace(CUTLER, working_size=16)).size == (64, 64)


def test_memory_is_reported_or_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert memory.total_memory(cpu) > 1 << 28
    monkeypatch.delattr(os, "sysconf")
    assert memory.total_memory(cpu) == memory.ASSUMED_MEMORY


def test_missing_backend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    refiner = MaskRefiner(torch.zeros(3, 8, 8), replace(CUTLER, backend="pydensecrf"))
    with pytest.raises(UserError, match="the extra 'pydensecrf'"):
        refiner(torch.zeros(1, 8, 8))
