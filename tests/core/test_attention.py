"""Recording attention, the layers that are read, and means over layers."""

import pytest
import torch
from torch import nn

from em_core.model.columns import column_probabilities, select_columns
from em_core.model.layers import (
    AttentionLayer,
    finest_size,
    halved,
    loss_layers,
    mask_layers,
    size_of_map,
)
from em_core.model.recording import AttentionRecorder, mean_maps


def unet_layers(latent_size: tuple[int, int]) -> tuple[AttentionLayer, ...]:
    """The layers of SD 1.5's UNet: two per down block, one in the middle, three per up block."""
    down, middle = [("down", level, 2) for level in (0, 1, 2)], [("mid", 3, 1)]
    blocks = [*down, *middle, *(("up", level, 3) for level in (2, 1, 0))]
    return tuple(
        AttentionLayer(f"{stage}{2**level}.{i}", halved(latent_size, level), stage != "mid")
        for stage, level, count in blocks
        for i in range(count)
    )


def recorder_of(
    *layers: AttentionLayer, grad: bool | tuple[str, ...] = False, **select
) -> AttentionRecorder:
    return AttentionRecorder(select, {layer.name: layer for layer in layers}, grad)


def test_pixels_become_rows_and_columns() -> None:
    """A layer of nominally 12x8 whose input was halved: pixel y * 4 + x stands at (y, x)."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6 * 4, 12, generator=g), torch.randn(2, 9, 12, generator=g)
    select = select_columns([[[1], [3, 4, 7]], [[], [8]]], 9)
    recorder = recorder_of(AttentionLayer("layer", (12, 8)), text=select)
    recorder.record("layer", q, k, heads=3)
    expected, maps = column_probabilities(q, k, select, heads=3), recorder.maps["layer"]
    assert maps.shape == (2, 2, 6, 4)
    assert all(
        torch.equal(maps[:, :, y, x], expected[:, :, y * 4 + x])
        for y in range(6) for x in range(4)
    )  # fmt: skip


def test_each_layer_reads_the_columns_of_its_stream() -> None:
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 4, 6, generator=g), torch.randn(1, 3, 6, generator=g)
    first, last = select_columns([[[0]]], 3), select_columns([[[2]]], 3)
    layers = [AttentionLayer(name, (2, 2), stream=name) for name in ("long", "short")]
    recorder = recorder_of(*layers, long=first, short=last)
    for layer, select in zip(layers, (first, last), strict=True):
        recorder.record(layer.name, q, k, heads=2)
        expected = column_probabilities(q, k, select, heads=2).reshape(1, 1, 2, 2)
        assert torch.equal(recorder.maps[layer.name], expected)


def test_gradient_reaches_the_keys_only_where_asked() -> None:
    q, k = torch.randn(1, 4, 6), nn.Parameter(torch.randn(1, 3, 6))
    select, layer = select_columns([[[1]]], 3), AttentionLayer("layer", (2, 2))
    for grad in (True, False):
        recorder = recorder_of(layer, grad=grad, text=select)
        recorder.record("layer", q, k, heads=2)
        assert recorder.maps["layer"].requires_grad == grad


def test_the_graph_is_kept_of_the_named_layers_alone() -> None:
    q, k = torch.randn(1, 4, 6), nn.Parameter(torch.randn(1, 3, 6))
    layers = [AttentionLayer(name, (2, 2)) for name in ("a", "b")]
    recorder = recorder_of(*layers, grad=("b",), text=select_columns([[[1]]], 3))
    for layer in layers:
        recorder.record(layer.name, q, k, heads=2)
    assert [recorder.maps[layer.name].requires_grad for layer in layers] == [False, True]


def test_a_recomputation_leaves_the_first_maps() -> None:
    """Recomputed maps would hold the graph of the recomputation; those without one are not computed."""
    q, k = torch.randn(1, 4, 6), nn.Parameter(torch.randn(1, 3, 6))
    layers = [AttentionLayer(name, (2, 2)) for name in ("a", "b")]
    recorder = recorder_of(*layers, grad=("b",), text=select_columns([[[1]]], 3))
    for layer in layers:
        recorder.record(layer.name, q, k, heads=2)
    first = dict(recorder.maps)
    recorder.record("a", q, k, heads=5)  # 5 heads do not divide 6: an error, were it computed
    recorder.record("b", q + 1, k, heads=2)
    assert all(recorder.maps[name] is first[name] for name in first)


def test_only_wanted_layers_are_kept() -> None:
    recorder = recorder_of(AttentionLayer("a", (2, 2)), text=select_columns([[[0]]], 3))
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
def test_size_of_map(queries: int, latent: tuple, expected: tuple) -> None:
    assert size_of_map(queries, latent) == expected


def test_map_size_refuses_what_is_no_halving() -> None:
    with pytest.raises(ValueError, match="Expected a halving"):
        size_of_map(63, (16, 16))


def test_mean_over_layers_of_several_sizes() -> None:
    maps = {"a": torch.full((1, 1, 2, 2), 3.0), "b": torch.full((1, 1, 4, 4), 1.0)}
    torch.testing.assert_close(mean_maps(maps, ["a", "b"], (4, 4)), torch.full((1, 1, 4, 4), 2.0))


def test_layers_at_512_pixels_are_the_papers() -> None:
    """Break-a-Scene: five 16x16 layers for the loss; masks from 16, 32 and 64; all 16 on request."""
    layers = unet_layers((64, 64))
    names = loss_layers(layers)
    assert names == ("down4.0", "down4.1", "up4.0", "up4.1", "up4.2")
    assert len(mask_layers(layers, all_layers=False)) == 15
    assert len(mask_layers(layers, all_layers=True)) == 16
    assert loss_layers(unet_layers((96, 64))) == names
    assert finest_size(layers) == (64, 64)


def test_the_innermost_layer_is_read_only_where_all_are() -> None:
    layers = unet_layers((64, 64))
    assert "mid8.0" not in mask_layers(layers, all_layers=False)
    assert mask_layers(layers, all_layers=True) == tuple(layer.name for layer in layers)
    with pytest.raises(ValueError, match="No attention layer left"):
        loss_layers([layer for layer in layers if not layer.localises])


def test_layers_too_coarse_for_the_loss_are_not_read() -> None:
    layers = (*unet_layers((64, 64)), AttentionLayer("coarse", (4, 4)))
    assert "coarse" not in mask_layers(layers, all_layers=False)
    assert "coarse" in mask_layers(layers, all_layers=True)
