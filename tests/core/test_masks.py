"""Thresholds, competition, guards and resizing, against brute force and closed forms."""

import numpy as np
import pytest
import torch

from em_core.masks.estimate import Estimate, left_to_right, masks_among, masks_from_maps
from em_core.masks.guards import Guards
from em_core.masks.measures import agreement, iou, union
from em_core.masks.regions import Regions
from em_core.masks.resizing import cut, resize
from em_core.masks.settings import MaskSettings
from em_core.masks.thresholds import binarise, compete, min_max, otsu, threshold_maps


def random_maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_min_max() -> None:
    maps = min_max(random_maps(3, 5, 7) * 4 - 2)
    torch.testing.assert_close(maps.amin(dim=(-2, -1)), torch.zeros(3))
    torch.testing.assert_close(maps.amax(dim=(-2, -1)), torch.ones(3))
    assert torch.equal(min_max(torch.full((1, 2, 2), 0.3)), torch.zeros(1, 2, 2))


def otsu_by_definition(values: np.ndarray, bins: int) -> float:
    candidates = np.linspace(0, 1, bins + 1)[1:-1]

    def between(t: float) -> float:
        low, high = values[values <= t], values[values > t]
        if len(low) == 0 or len(high) == 0:
            return 0.0
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    return max(candidates, key=between)


@pytest.mark.parametrize("bins", [10, 64])
def test_otsu_is_the_best_split(bins: int) -> None:
    g = torch.Generator().manual_seed(1)
    low, high = torch.rand(40, generator=g) * 0.3, 0.6 + torch.rand(24, generator=g) * 0.4
    maps = torch.cat([low, high]).reshape(1, 8, 8)
    assert float(otsu(maps, bins)) == pytest.approx(
        otsu_by_definition(maps.double().numpy().ravel(), bins)
    )
    assert threshold_maps(maps, "otsu").sum() == 24


def test_competition_gives_each_pixel_one_owner() -> None:
    maps = random_maps(4, 9, 9)
    owner = compete(maps)
    assert torch.equal(owner.sum(dim=0), torch.ones(9, 9, dtype=torch.long))
    assert torch.equal(owner.int().argmax(dim=0), maps.argmax(dim=0))


def test_a_pixel_under_every_threshold_belongs_to_nobody() -> None:
    maps = torch.tensor([[[0.9, 0.5, 0.1]], [[0.6, 0.7, 0.2]]])
    assert binarise(maps, 0.4).tolist() == [[[True, False, False]], [[False, True, False]]]
    assert binarise(maps, 0.4, competition=False).tolist() == [
        [[True, True, False]],
        [[True, True, False]],
    ]


def test_iou_by_sets() -> None:
    a, b = random_maps(5, 6, 6, seed=1) > 0.5, random_maps(5, 6, 6, seed=2) > 0.5
    for x, y, value in zip(a, b, iou(a, b), strict=True):
        p, q = {tuple(i) for i in x.nonzero().tolist()}, {tuple(i) for i in y.nonzero().tolist()}
        assert float(value) == pytest.approx(len(p & q) / len(p | q))
    empty = torch.zeros(1, 3, 3, dtype=torch.bool)
    assert float(iou(empty, empty)) == 1.0


def test_guards() -> None:
    guards = Guards(min_agreement=0.5, min_area=0.05, max_area=0.9)
    good = torch.zeros(10, 10, dtype=torch.bool)
    good[2:6, 2:6] = True
    tiny, all_of_it, elsewhere = (
        torch.zeros_like(good),
        torch.ones_like(good),
        torch.zeros_like(good),
    )
    tiny[0, 0] = True
    elsewhere[6:, 6:] = True
    refined = torch.stack([good, tiny, all_of_it, elsewhere])
    thresholded = torch.stack([good, tiny, all_of_it, good])
    assert guards.accept(refined, thresholded).tolist() == [True, False, False, False]


def test_resizing_keeps_the_area() -> None:
    masks = (random_maps(2, 32, 48) > 0.5).float()
    small = resize(masks, (8, 12), "mask")
    torch.testing.assert_close(small.mean(dim=(-2, -1)), masks.mean(dim=(-2, -1)))
    blocks = masks.reshape(2, 8, 4, 12, 4).mean(dim=(2, 4))
    torch.testing.assert_close(small, blocks)
    assert torch.equal(cut(small), blocks > 0.5)


def test_growing_is_bilinear() -> None:
    """A ramp stays a ramp between the centres of its pixels, and level beyond the outermost."""
    ramp = torch.tensor([0.0, 0.5, 1.0]).expand(1, 3, 3)
    centres = (torch.arange(12) + 0.5) / 4 - 0.5
    expected = (centres / 2).clamp(0, 1).expand(1, 12, 12)
    torch.testing.assert_close(resize(ramp, (12, 12), "map"), expected)


def test_each_side_is_resized_by_its_own_rule() -> None:
    """The height shrinks by area means while the width grows."""
    masks = random_maps(2, 8, 4)
    means = masks.reshape(2, 4, 2, 4).mean(dim=2)
    torch.testing.assert_close(resize(masks, (4, 8), "mask"), resize(means, (4, 8), "mask"))


def test_pictures_keep_their_range_and_mean() -> None:
    """Hard edges overshoot in bicubic resizing; a picture of the right size is not touched."""
    picture = (random_maps(3, 32, 48) > 0.5).float()
    small = resize(picture, (20, 30), "picture")
    assert float(small.min()) >= 0 and float(small.max()) <= 1
    torch.testing.assert_close(small.mean(), picture.mean(), atol=0.02, rtol=0)
    assert resize(picture, (32, 48), "picture") is picture


def test_agreement_is_the_correlation() -> None:
    maps = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    masks = maps > torch.tensor([0.2, 0.5, 0.7])[:, None, None]
    expected = [
        np.corrcoef(a.flatten(), m.flatten())[0, 1] for a, m in zip(maps, masks, strict=True)
    ]
    assert agreement(maps, masks).tolist() == pytest.approx(expected, abs=1e-6)
    assert agreement(maps, torch.ones_like(masks)).tolist() == [0, 0, 0]
    assert agreement(torch.ones(3, 8, 9), masks).tolist() == [0, 0, 0]


def test_union_is_the_maximum() -> None:
    masks = random_maps(2, 3, 4, 4)
    assert torch.equal(union(masks)[:, 0], masks.max(dim=1).values)


@pytest.mark.parametrize("peak", [0.5, 0.9, 0.995])
def test_a_peak_below_one_does_not_hang_on_a_single_pixel(peak: float) -> None:
    maps = random_maps(2, 20, 20)
    expected = [
        np.clip((m - m.min()) / (np.quantile(m, peak, method="inverted_cdf") - m.min()), None, 1)
        for m in maps.numpy()
    ]
    torch.testing.assert_close(min_max(maps, peak), torch.tensor(np.stack(expected)))
    maps[0, 3, 4] = 50.0
    torch.testing.assert_close(min_max(maps, peak), min_max(maps.clamp(max=1), peak))


def test_masks_among_some_are_those_of_a_prompt_without_the_others() -> None:
    maps, settings = random_maps(4, 8, 8), MaskSettings(crf=None)
    labels = torch.arange(64).reshape(8, 8) // 8
    regions = Regions(labels, alike=((0, 1, 3),))
    alone = masks_from_maps(maps[[1, 3]], (16, 16), settings, None, Regions(labels, ((0, 1),)))
    among = masks_among([1, 3], maps, (16, 16), settings, None, regions)
    assert torch.equal(among.masks[[1, 3]], alone.masks) and not among.masks[[0, 2]].any()
    assert torch.equal(among.thresholded[[1, 3]], alone.thresholded)
    assert not masks_among([], maps, (16, 16), settings, None, regions).masks.any()


def test_masks_of_one_word_stand_from_left_to_right_to_the_pixel() -> None:
    """By the mean column, ties from the top; empty masks and those of other words stay where they are."""
    masks = torch.zeros(6, 9, 12, dtype=torch.bool)
    masks[0, 5:8, 2:6] = True  # mean column 3.5
    masks[1, :3, 2:5] = True  # 3: half a column to the left
    masks[3, 4:6, 2:5] = True  # 3 too, below it
    masks[4, 6:9, 9:] = True
    masks[5, 7:, :2] = True  # of another word
    given = Estimate(masks, masks.float(), masks, masks)
    order = [1, 3, 2, 0, 4, 5]
    got = left_to_right(given, [(0, 1, 2, 3, 4)])
    for part in (got.masks, got.thresholded, got.probability, got.anchors):
        assert part is not None and torch.equal(part.bool(), masks[order])
    assert torch.equal(left_to_right(given, [(4, 3, 2, 1, 0)]).masks, masks[[4, 0, 2, 3, 1, 5]])
    assert torch.equal(left_to_right(given, ()).masks, masks)
