"""Masks from elsewhere: split by instance, and inverted ones noticed."""

from collections.abc import Iterator

import pytest
import torch
from scipy.ndimage import label
from skimage.measure import label as other_label
from torch import Tensor

from em_core.errors import UserError
from em_core.masks.given import by_instance, inverted, parts


def flooded(mask: Tensor) -> Iterator[frozenset[tuple[int, int]]]:
    """The pixels of each part, by walking from neighbour to neighbour."""
    left = {(int(y), int(x)) for y, x in mask.nonzero()}
    while left:
        part, waiting = set(), [left.pop()]
        while waiting:
            y, x = waiting.pop()
            part.add((y, x))
            near = {(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)} & left
            left -= near
            waiting += near
        yield frozenset(part)


@pytest.mark.parametrize("seed", range(6))
def test_parts_are_the_connected_components(seed: int) -> None:
    mask = torch.rand(13, 17, generator=torch.Generator().manual_seed(seed)) > 0.6 + 0.04 * seed
    found = {frozenset((int(y), int(x)) for y, x in part.nonzero()) for part in parts(mask, 0.0)}
    assert found == set(flooded(mask))
    eight = torch.ones(3, 3).numpy()
    assert len(found) == label(mask.numpy(), eight)[1] == other_label(mask.numpy()).max()


def test_specks_are_left_out_and_the_order_is_from_left_to_right() -> None:
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[2:12, 25:35] = True
    mask[20:38, 3:9] = True
    mask[0, 0] = mask[39, 39] = True
    right, left = mask.clone(), mask.clone()
    right[:, :20], left[:, 20:] = False, False
    right[39, 39] = left[0, 0] = False
    named = by_instance(mask, ("rex", "doll"))
    assert torch.equal(named["rex"], left) and torch.equal(named["doll"], right)
    with pytest.raises(UserError, match="as many separate parts; got one with 2"):
        by_instance(mask, ("rex", "doll", "kit"))
    assert parts(torch.zeros_like(mask)).shape == (0, 40, 40)


def test_a_background_is_no_inverted_mask() -> None:
    thing = torch.zeros(40, 40)
    thing[9:31, 9:31] = 1
    assert inverted([1 - thing]) == [0] and inverted([thing]) == []
    assert inverted([thing, 1 - thing]) == []
    assert inverted([1 - thing, thing, 1 - thing]) == [0, 2]
