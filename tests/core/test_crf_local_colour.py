"""Local colour models and graded masks, against sums over all pairs, closed forms and photographs."""

import math
from dataclasses import replace

import photos
import pytest
import torch
from torch import Tensor

from em_core.errors import UserError
from em_core.masks.crf import (
    CUTLER,
    DEMO,
    DIFFUMASK,
    LOCAL_COLOUR,
    MaskRefiner,
    joint_unary,
    labels,
)
from em_core.masks.crf.confidence import confident_masks
from em_core.masks.crf.local_colour import FLOOR, LocalColour, label_shares
from em_core.masks.measures import iou
from em_core.masks.thresholds import binarise


def striped(side: int = 32, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """A picture whose upper `share` is red and whose rest is blue, and the mask of the red."""
    red = torch.zeros(side, side)
    red[: round(side * share)] = 1
    return torch.stack([red, torch.zeros_like(red), 1 - red]), red[None]


def random_marginals(labels: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(labels)
    return torch.softmax(2 * torch.randn(labels, n, generator=generator), dim=0)


def dense(refiner: MaskRefiner) -> tuple[Tensor, Tensor]:
    """The two filters of a refiner's colour models as matrices, found column by column."""
    n = refiner.size[0] * refiner.size[1]
    colour = refiner.colour
    return colour.alike(torch.eye(n)).double(), colour.near(torch.eye(n)).double()


@pytest.mark.parametrize("count", (2, 3, 5))
def test_evidence_is_bayes_rule_over_all_pairs(count: int) -> None:
    """log of p(l | place, colour) / p(l | place), each a mean over all pixels, in float64."""
    image = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    refiner = MaskRefiner(image, replace(LOCAL_COLOUR, bilateral_theta_rgb=60.0))
    Q = random_marginals(count, 144)
    alike, near = ((K @ Q.T.double()) / K.sum(1, keepdim=True) for K in dense(refiner))
    expected = torch.log((alike + FLOOR) / (near + FLOOR)).T
    assert torch.allclose(refiner.colour.evidence(Q).double(), expected, atol=1e-4)


@pytest.mark.parametrize("share", (0.25, 0.5))
def test_evidence_of_two_far_colours(share: float) -> None:
    """In a window as large as the picture, a mask of all red has share 1 of the red, `share` of all."""
    image, mask = striped(share=share)
    Q = torch.cat([mask, 1 - mask]).flatten(1)
    wide = MaskRefiner(image, replace(LOCAL_COLOUR, bilateral_theta_xy=1e5))
    here = wide.colour.evidence(Q)[0].view(32, 32)
    red, blue = math.log((1 + FLOOR) / (share + FLOOR)), math.log(FLOOR / (share + FLOOR))
    assert float(here[0, 0]) == pytest.approx(red, abs=1e-3)
    assert float(here[-1, 0]) == pytest.approx(blue, abs=1e-3)


def test_one_colour_says_nothing() -> None:
    """All pixels are alike, so that both shares are those of the neighbourhood."""
    Q = random_marginals(3, 32 * 32)
    evidence = MaskRefiner(torch.full((3, 32, 32), 0.5)).colour.evidence(Q)
    assert float(evidence.abs().max()) < 0.05


@pytest.mark.parametrize("value", (0.0, 1.0))
def test_evidence_for_what_is_nowhere_or_everywhere(value: float) -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    Q = torch.tensor([[value], [1 - value]]).repeat(1, 256)
    assert float(MaskRefiner(image).colour.evidence(Q).abs().max()) < 1e-4


def test_shares_sum_to_one() -> None:
    colour = LocalColour(*[MaskRefiner(striped()[0]).colour.near] * 2)
    shares = label_shares(colour.near, random_marginals(4, 1024))
    assert torch.allclose(shares.sum(dim=0), torch.ones(1024), atol=1e-5)
    assert float(shares.min()) >= 0


def test_rounds_alternate_between_models_and_crf() -> None:
    image, mask = striped()
    refiner = MaskRefiner(image, LOCAL_COLOUR)
    unary = joint_unary(mask, LOCAL_COLOUR.unary_strength)
    Q = torch.softmax(-unary, dim=0)
    for rounds in (1, 2):
        evidence = refiner.colour.evidence(Q.flatten(1)).view_as(unary)
        Q = refiner.infer(unary - LOCAL_COLOUR.colour_weight * evidence)
        found = MaskRefiner(image, replace(LOCAL_COLOUR, colour_rounds=rounds))(mask)
        assert torch.allclose(found, Q[:1], atol=1e-6)


def test_alone_is_each_mask_by_itself() -> None:
    image, mask = striped()
    both = torch.cat([mask, mask.flip(-2)])
    alone = MaskRefiner(image, replace(LOCAL_COLOUR, joint=False))(both)
    each = torch.cat([MaskRefiner(image)(one[None]) for one in both])
    assert torch.allclose(alone, each, atol=1e-6)


def test_backends_agree() -> None:
    pytest.importorskip("pydensecrf", reason="pydensecrf is not installed")
    image, mask = striped()
    noisy = image + 0.05 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        MaskRefiner(noisy.clamp(0, 1), replace(LOCAL_COLOUR, backend=backend))(0.8 * mask)
        for backend in ("torch", "pydensecrf")
    )
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_small_thing_is_not_swallowed() -> None:
    """A disc that differs little from a noisy ground: DiffuMask's settings lose it."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    disc = (x - 40).square() + (y - 50).square() < 25
    noise = 0.02 * torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    image = (0.5 + 0.06 * disc + noise).clamp(0, 1)
    kept = [
        float(iou(labels(MaskRefiner(image, settings)(disc[None]))[0], disc))
        for settings in (LOCAL_COLOUR, DIFFUMASK)
    ]
    assert kept[0] > 0.95 and kept[1] < 0.5


def test_masks_graded_by_their_maps() -> None:
    """Thresholds of .4 and .2: halfway to 0 or to 1, a mask is a quarter or three quarters sure."""
    maps = torch.tensor([[[0.0, 0.2, 0.4, 0.7, 1.0]], [[0.1, 0.2, 0.6, 0.0, 1.0]]])
    masks = (maps >= torch.tensor([0.4, 0.2])[:, None, None]).float()
    expected = torch.tensor([[[0.0, 0.25, 0.5, 0.75, 1.0]], [[0.25, 0.5, 0.75, 0.0, 1.0]]])
    assert torch.allclose(confident_masks(masks, maps), expected)


def test_graded_masks_keep_their_side() -> None:
    """Pixels that another mask took, or that something removed, do not come back."""
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([maps[0] > maps[1], (maps[1] > maps[0]) & (maps[1] > 0.6)]).float()
    graded = confident_masks(masks, maps)
    assert float(graded[masks == 1].min()) >= 0.5
    assert float(graded[masks == 0].max()) <= 0.5
    empty, full = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    assert float(confident_masks(empty, maps[:1]).max()) <= 0.5
    assert float(confident_masks(full, maps[:1]).min()) >= 0.5
    assert torch.isfinite(confident_masks(full, full)).all()


def test_maps_count_only_where_the_settings_use_them() -> None:
    image, mask = striped()
    maps = (0.6 * mask + 0.2).mul(torch.linspace(0.5, 1, 32))
    with_maps, without = (
        MaskRefiner(image, replace(LOCAL_COLOUR, use_maps=use))(mask, maps) for use in (True, False)
    )
    assert torch.equal(without, MaskRefiner(image)(mask))
    assert torch.equal(with_maps, MaskRefiner(image)(confident_masks(mask, maps)))
    assert torch.equal(MaskRefiner(image, CUTLER)(mask, maps), MaskRefiner(image, CUTLER)(mask))


def test_bad_maps_are_refused() -> None:
    image, mask = striped()
    with pytest.raises(UserError, match=r"Bad maps\. Expected one per mask \(1\), got 2"):
        MaskRefiner(image)(mask, mask.repeat(2, 1, 1))
    with pytest.raises(UserError, match=r"Bad maps\. Expected values in 0\.\.1, got -1"):
        MaskRefiner(image)(mask, -mask)


def test_kernels_are_shared() -> None:
    """With an appearance kernel of its own, the CRF uses the colour models' lattice."""
    refiner = MaskRefiner(striped()[0], replace(LOCAL_COLOUR, bilateral_weight=5.0))
    assert refiner.crf.kernels[1][0] is refiner.colour.alike
    assert len(MaskRefiner(striped()[0], CUTLER).crf.kernels) == 2


def coarse(truth: Tensor, noise: float) -> Tensor:
    """Soft maps of 16x16 as of attention, enlarged."""
    small = torch.nn.functional.adaptive_avg_pool2d(truth, 16)
    small = torch.nn.functional.avg_pool2d(small, 3, stride=1, padding=1, count_include_pad=False)
    small = small + noise * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small[None], truth.shape[-2:], mode="bilinear")[0]
    return large.clamp(0, 1)


@photos.needed
@pytest.mark.parametrize("name", photos.NAMES)
@pytest.mark.parametrize("noise", (0.1, 0.3))
@pytest.mark.parametrize("with_maps", (True, False))
def test_photos_are_not_harmed(name: str, noise: float, with_maps: bool) -> None:
    """The aim that the defaults were chosen for: no photo's masks lose more than .02."""
    image, truth = photos.read_photo(name, (192, 192), 2)
    maps = coarse(truth, noise)
    masks = binarise(maps, 0.5)
    refined = labels(MaskRefiner(image)(masks, maps if with_maps else None))
    before, after = (float(iou(found, truth > 0.5).mean()) for found in (masks, refined))
    assert after > before - 0.02


@photos.needed
@pytest.mark.parametrize("name", photos.NAMES)
def test_true_masks_of_photos_stay(name: str) -> None:
    image, truth = photos.read_photo(name, (192, 192), 1)
    refined = labels(MaskRefiner(image)(truth))
    assert float(iou(refined, truth > 0.5).min()) > 0.97


def test_the_demo_preset_repairs_a_blurred_mask() -> None:
    image, mask = striped()
    maps = torch.nn.functional.avg_pool2d(mask, 9, stride=1, padding=4, count_include_pad=False)
    refined = labels(MaskRefiner(image, DEMO)((maps > 0.3).float(), maps))
    assert torch.equal(refined, mask > 0.5)
