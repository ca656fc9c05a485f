"""Recording and aggregating attention, against plain loops."""

import pytest
import torch
from torch import nn

from em_core.model.columns import column_probabilities, select_columns
from em_core.model.layers import CrossAttentionLayer, loss_layers, map_size, mask_layers
from em_core.model.recording import AttentionRecorder, mean_maps

SD = tuple(
    CrossAttentionLayer(f"{stage}{scale}.{i}", scale, stage)
    for stage, scale, count in (
        ("down", 1, 2), ("down", 2, 2), ("down", 4, 2), ("mid", 8, 1), ("up", 4, 3), ("up", 2, 3), ("up", 1, 3)
    )
    for i in range(count)
)  # fmt: skip


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


def test_column_probabilities_equal_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6 * 4, 12, generator=g), torch.randn(2, 9, 12, generator=g)
    columns = [[[1], [3, 4, 7]], [[], [8]]]
    maps = column_probabilities(q, k, select_columns(columns, 9), heads=3, latent_size=(12, 8))
    expected = brute_force(q, k, columns, heads=3).reshape(2, 2, 6, 4)
    torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=0)


def test_gradient_reaches_the_keys_only_where_asked() -> None:
    q, k = torch.randn(1, 4, 6), nn.Parameter(torch.randn(1, 3, 6))
    select = select_columns([[[1]]], 3)
    for grad in (True, False):
        recorder = AttentionRecorder(select, (2, 2), grad=grad)
        recorder.record("layer", q, k, heads=2)
        assert recorder.maps["layer"].requires_grad == grad


def test_only_wanted_layers_are_kept() -> None:
    recorder = AttentionRecorder(select_columns([[[0]]], 3), (2, 2), layers=frozenset({"a"}))
    for layer in ("a", "b"):
        recorder.record(layer, torch.randn(1, 4, 6), torch.randn(1, 3, 6), heads=1)
    assert set(recorder.maps) == {"a"}


@pytest.mark.parametrize(
    ("queries", "latent", "expected"),
    [
        (4096, (64, 64), (64, 64)),
        (64, (64, 64), (8, 8)),
        (6 * 4, (12, 8), (6, 4)),
        (5 * 4, (18, 13), (5, 4)),
    ],
)
def test_map_size(queries: int, latent: tuple, expected: tuple) -> None:
    assert map_size(queries, latent) == expected


def test_map_size_refuses_what_is_no_halving() -> None:
    with pytest.raises(ValueError, match="Expected a halving"):
        map_size(63, (16, 16))


def test_mean_over_layers_of_several_sizes() -> None:
    maps = {"a": torch.full((1, 1, 2, 2), 3.0), "b": torch.full((1, 1, 4, 4), 1.0)}
    torch.testing.assert_close(mean_maps(maps, ["a", "b"], (4, 4)), torch.full((1, 1, 4, 4), 2.0))


def test_layers_at_512_pixels_are_the_papers() -> None:
    """Break-a-Scene: five 16x16 layers for the loss; masks from 16, 32 and 64; all 16 on request."""
    names = loss_layers(SD, (64, 64))
    assert names == ("down4.0", "down4.1", "up4.0", "up4.1", "up4.2")
    assert len(mask_layers(SD, (64, 64), all_layers=False)) == 15
    assert len(mask_layers(SD, (64, 64), all_layers=True)) == 16
    assert loss_layers(SD, (96, 64)) == names
