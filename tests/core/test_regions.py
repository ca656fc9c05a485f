"""Regions from self-attention, and which concept each of them belongs to."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import jensenshannon, squareform
from torch import Tensor

from em_core.masks.regions import (
    Regions,
    anchors,
    belonging,
    divergence,
    evidence,
    find_regions,
    margin,
    neighbours,
    placed,
    with_spots,
    without_islands,
)
from em_core.model.layers import AttentionLayer, region_layers
from em_core.model.recording import AttentionRecorder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int, sharpness: float = 1.0, seed: int = 0) -> Tensor:
    """Probabilities, a row a cell."""
    return (sharpness * torch.randn(count, count, generator=seeded(seed))).softmax(dim=-1)


def groups(labels: Tensor) -> set[frozenset[int]]:
    """The partition that labels stand for, whatever the numbers."""
    flat = labels.flatten().tolist()
    return {frozenset(i for i, x in enumerate(flat) if x == label) for label in set(flat)}


def test_divergence_is_scipys() -> None:
    P = rows(12, 2.0)
    P[3] = torch.eye(12)[0]
    expected = [[jensenshannon(a, b) ** 2 for b in P.numpy()] for a in P.numpy()]
    torch.testing.assert_close(
        divergence(P, rows=5), torch.tensor(expected).float(), atol=1e-6, rtol=1e-5
    )


def test_neighbours_share_an_edge() -> None:
    height, width = 3, 4
    cells = list(itertools.product(range(height), range(width)))
    expected = [[abs(a - c) + abs(b - d) == 1 for c, d in cells] for a, b in cells]
    assert torch.equal(neighbours((height, width)), torch.tensor(expected))


@pytest.mark.parametrize("limit", [0.02, 0.05, 0.08, 0.2])
def test_regions_of_a_column_of_blocks_are_those_of_average_linkage(limit: float) -> None:
    """Where everything touches (1 x 2 cells) or the nearest always do, scipy's clusters are the oracle.

    Cells in a row that attend the more alike the nearer they are: the nearest clusters touch.
    """
    places = torch.cumsum(torch.rand(14, generator=seeded(4)) ** 3, dim=0)
    P = (-3 * (places[:, None] - places[None]).square()).softmax(dim=-1)
    D = divergence(P).double()
    D.fill_diagonal_(0)
    expected = fcluster(
        linkage(squareform(((D + D.T) / 2).numpy(), checks=False), "average"), limit, "distance"
    )
    assert groups(find_regions(P, (1, 14), limit)) == groups(torch.as_tensor(expected))


def test_regions_are_connected_and_merge_as_the_limit_grows() -> None:
    size, P, before = (5, 6), rows(30, 1.5), None
    for limit in (0.01, 0.1, 0.15, 0.2, 1.0):
        labels = find_regions(P, size, limit)
        for group in groups(labels):
            reached, edge = set(), {min(group)}
            while edge:
                reached |= edge
                edge = {j for i in edge for j in neighbours(size)[i].nonzero().flatten().tolist()}
                edge = (edge & group) - reached
            assert reached == group
        if before is not None:
            assert all(any(small <= large for large in groups(labels)) for small in groups(before))
        before = labels
    assert groups(before) == {frozenset(range(30))}


def test_islands_belong_to_the_thing_around_them() -> None:
    """A core of two cells in a thing; not one that touches the ground too, nor one of three cells."""
    labels = torch.zeros(16, 16, dtype=torch.long)
    labels[1:7, 1:7] = 1
    labels[3, 3:5] = 2  # the core of a thing
    labels[9:15, 1:7] = 3
    labels[11, 3:6] = 4  # three cells: 1.2% of the picture
    labels[1:7, 9:15] = 5
    labels[6, 11] = 6  # at the rim of its thing
    labels[11, 11] = 7  # a speck in the ground
    labels[0, 0], labels[0, 1] = 8, 9  # two specks that touch one another and the ground
    expected = labels.clone()
    expected[3, 3:5] = 1
    expected[expected > 2] -= 1
    assert torch.equal(without_islands(labels), expected)
    assert torch.equal(without_islands(expected), expected)


def test_an_island_in_an_island_belongs_to_the_thing_too() -> None:
    """Of 400 cells four are one in a hundred: a ring of three at the border, and a corner in it."""
    labels = torch.ones(20, 20, dtype=torch.long)
    labels[10:] = 0
    labels[:, 10:] = 0
    labels[0, 1], labels[1, 1], labels[1, 0], labels[0, 0] = 2, 2, 2, 3
    assert bool((without_islands(labels)[:10, :10] == 1).all())


STRIPES = torch.arange(4).repeat_interleave(3).expand(4, 12)
"""Four regions from left to right, each 4 x 3 cells."""


def maps_of(*heights: tuple[float, ...]) -> Tensor:
    """A map a concept: its values in the four stripes."""
    return torch.tensor(heights)[:, STRIPES]


def test_evidence_is_the_mean_over_a_region() -> None:
    maps = torch.rand(2, 4, 12, generator=seeded())
    found = evidence(maps, Regions(STRIPES).members)
    expected = [[m[:, 3 * r : 3 * r + 3].mean() for r in range(4)] for m in maps]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_anchors_are_the_best_of_all_assignments() -> None:
    members = Regions(STRIPES).members
    for seed in range(20):
        found = torch.rand(3, 4, generator=seeded(seed))
        best = max(
            itertools.permutations(range(4), 3),
            key=lambda p: float(sum(found[i, r].log() for i, r in enumerate(p))),
        )
        assert anchors(found, members, ()).tolist() == list(best)
    assert anchors(torch.rand(5, 4), members, ()) is None


def test_margin_is_that_of_the_best_other_assignment() -> None:
    members = Regions(STRIPES).members

    def score(found: Tensor, p: tuple[int, ...]) -> float:
        return float(sum(found[i, r].log() for i, r in enumerate(p)))

    for seed in range(20):
        found = torch.rand(3, 4, generator=seeded(seed)).clamp(min=0.01)
        ranked = sorted(itertools.permutations(range(4), 3), key=lambda p: -score(found, p))
        expected = score(found, ranked[0]) - score(found, ranked[1])
        assert margin(found, members, ()) == pytest.approx(expected, abs=1e-4)
        found[1] = found[0]  # alike: who of the two has which region is no other assignment
        ranked = sorted(itertools.permutations(range(4), 3), key=lambda p: -score(found, p))
        other = next(p for p in ranked if {*p[:2]} != {*ranked[0][:2]} or p[2] != ranked[0][2])
        expected = score(found, ranked[0]) - score(found, other)
        assert margin(found, members, [(0, 1)]) == pytest.approx(expected, abs=1e-4)
    assert margin(torch.rand(5, 4), members, ()) == float("inf")


def test_concepts_that_are_alike_stand_from_left_to_right() -> None:
    """The same map for both: the prompt's first has the left one, and its order is what counts."""
    members = Regions(STRIPES).members
    found = torch.tensor([[0.1, 0.9, 0.1, 0.8], [0.1, 0.9, 0.1, 0.8], [0.1, 0.2, 0.9, 0.2]])
    assert anchors(found, members, [(0, 1)]).tolist() == [1, 3, 2]
    assert anchors(found, members, [(1, 0)]).tolist() == [3, 1, 2]
    high = torch.arange(4).repeat_interleave(3).expand(4, 12).T
    assert anchors(found, Regions(high).members, [(0, 1)]).tolist() == [
        1,
        3,
        2,
    ]  # ties: from the top


def test_a_nameless_thing_is_left_out_and_a_second_part_kept() -> None:
    """The best region, one at 0.7 of it, one at 0.4 of it, and the background."""
    keep = belonging(placed(maps_of((1.0, 0.7, 0.4, 0.05)), Regions(STRIPES)), share=0.6)
    assert keep[0, 0].tolist() == [
        1,
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        0,
        0,
        1,
        1,
    ]  # with the rim of what is barred


def test_what_another_concept_has_is_barred() -> None:
    """Both look for the first region; the second concept has to go where it fits next best."""
    maps = maps_of((1.0, 0.2, 0.0, 0.0), (1.0, 0.8, 0.0, 0.0))
    keep = belonging(placed(maps, Regions(STRIPES)), share=0.6)
    assert keep[0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert keep[1, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_what_is_told_of_regions_decides_between_maps_that_are_nearly_alike() -> None:
    maps = maps_of((1.0, 0.9, 0.0, 0.0), (0.9, 1.0, 0.0, 0.0))
    told = torch.tensor([[-1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]])
    assert placed(maps, Regions(STRIPES)).chosen.tolist() == [0, 1]
    exchanged = placed(maps, Regions(STRIPES, told=told))
    assert exchanged.chosen.tolist() == [1, 0]
    keep = belonging(exchanged, share=0.6)
    assert keep[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    clear = maps_of((1.0, 0.1, 0.0, 0.0), (0.1, 1.0, 0.0, 0.0))
    assert placed(clear, Regions(STRIPES, told=told)).chosen.tolist() == [0, 1]


def test_what_is_told_changes_nothing_where_it_names_the_same_region() -> None:
    """A second part of a thing stays the concept's, though its word is told of the first alone."""
    maps = maps_of((1.0, 0.7, 0.4, 0.05))
    told = torch.tensor([[1.0, -1.0, -1.0, 0.0]])
    plain, with_told = (placed(maps, Regions(STRIPES, told=t)) for t in (None, told))
    assert torch.equal(plain.found, with_told.found)


def test_fewer_regions_than_concepts_bar_nothing() -> None:
    maps = torch.rand(5, 4, 12, generator=seeded())
    assert bool((belonging(placed(maps, Regions(STRIPES)), 0.6) == 1).all())


def test_self_attention_by_definition() -> None:
    """Mean over samples and heads of softmax(q k^T / sqrt(d)); other pixels are left out."""
    layer = AttentionLayer("self", (2, 3))
    recorder = AttentionRecorder({}, {}, among={"self": layer})
    q, k = torch.randn(2, 2, 6, 8, generator=seeded())
    recorder.record("self", q, k, heads=2)
    expected = torch.stack(
        [
            (q[b, :, h] @ k[b, :, h].T / 2).softmax(-1)
            for b in range(2)
            for h in (slice(0, 4), slice(4, 8))
        ]
    ).mean(dim=0)
    torch.testing.assert_close(recorder.affinity["self"], expected)
    torch.testing.assert_close(expected.sum(dim=1), torch.ones(6))
    tiled = AttentionRecorder({}, {}, among={"self": layer})
    tiled.record("self", q[:, :3], k[:, :3], heads=2)
    assert not tiled.affinity


def test_regions_are_read_from_the_finest_layers_of_32_cells_or_fewer() -> None:
    sides = (64, 32, 16, 32, 8)
    layers = [AttentionLayer(str(i), (n, n)) for i, n in enumerate(sides)]
    assert [layer.name for layer in region_layers(layers)] == ["1", "3"]
    inner = [replace(layer, localises=False) for layer in layers]
    assert region_layers(inner) == ()


def test_a_spot_in_the_background_becomes_a_region() -> None:
    """One that is hot, large enough and apart from others; not a rim, a speck, or a faint one."""
    labels = torch.zeros(6, 8, dtype=torch.long)
    labels[1:3, 1:3] = 1
    spot = torch.zeros(2, 6, 8)
    spot[0, 1:3, 1:4] = 0.9  # region 1 and its rim
    spot[0, 0, 7] = 0.9  # a speck
    spot[1, 4:6, 5:7] = 0.5
    spot[1, 4, 0:2] = 0.2  # faint
    expected = labels.clone()
    expected[4:6, 5:7] = 2
    assert torch.equal(with_spots(labels, spot), expected)
    assert torch.equal(with_spots(labels, spot[:1]), labels)


def test_the_rim_of_what_is_barred_is_barred_but_for_ones_own() -> None:
    """Two regions of 2x2 cells, one column apart; the other concept's rim ends where one's own begins."""
    labels = torch.zeros(4, 7, dtype=torch.long)
    labels[1:3, 1:3], labels[1:3, 4:6] = 1, 2
    maps = torch.stack([(labels == 1).float(), (labels == 2).float()])
    keep = belonging(placed(maps, Regions(labels)), 0.6)[0]
    expected = torch.ones(4, 7)
    expected[:, 4:7] = 0
    assert torch.equal(keep, expected)
