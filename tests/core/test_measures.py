"""Crops, similarities, mixing, intervals and the table against loops, closed forms and scipy."""

from math import sqrt

import pytest
import torch
from scipy import stats
from scores import evaluation

from em_core.errors import UserError
from em_core.evaluate.contact import extremes
from em_core.evaluate.crops import masked_crop
from em_core.evaluate.encoders import Instruments
from em_core.evaluate.measures import (
    among_references,
    detect_and_compare,
    interval,
    pairwise,
    similarities,
)
from em_core.evaluate.summary import rankings, summarise
from em_core.evaluate.tables import pictures_csv, prompts_csv, summary_csv, table


def test_crop_of_every_mask_of_a_small_picture() -> None:
    """Each of 100 random masks: a square around it, its pixels unchanged, everything else black."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        picture = torch.rand(3, 6, 7, generator=generator) + 0.1
        mask = torch.rand(6, 7, generator=generator) > 0.85
        if not mask.any():
            continue
        crop = masked_crop(picture, mask)
        points = mask.nonzero().tolist()
        top, left = min(y for y, _ in points), min(x for _, x in points)
        height = max(y for y, _ in points) - top + 1
        width = max(x for _, x in points) - left + 1
        side = max(height, width)
        assert crop.shape == (3, side, side)
        above, before = (side - height) // 2, (side - width) // 2
        for y in range(side):
            for x in range(side):
                there = [y - above + top, x - before + left]
                expected = picture[:, there[0], there[1]] if there in points else torch.zeros(3)
                assert torch.equal(crop[:, y, x], expected)


def test_an_empty_mask_has_no_crop() -> None:
    with pytest.raises(UserError, match="empty"):
        masked_crop(torch.ones(3, 4, 4), torch.zeros(4, 4, dtype=torch.bool))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def test_similarities_are_mean_cosines() -> None:
    crops = [unit(5, seed=1), None, unit(5, seed=2)]
    references = [unit(3, 5, seed=3), unit(1, 5, seed=4)]
    found = similarities(crops, references)
    for row, crop in enumerate(crops):
        for column, of in enumerate(references):
            cosines = [
                0.0 if crop is None else float(torch.cosine_similarity(crop, r, dim=0)) for r in of
            ]
            assert float(found[row, column]) == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_references_among_themselves() -> None:
    references = [unit(3, 5, seed=3), unit(1, 5, seed=4)]
    found = among_references(references)
    a, b = references
    own = [float(a[i] @ a[j]) for i in range(3) for j in range(3) if i != j]
    assert float(found[0, 0]) == pytest.approx(sum(own) / 6, abs=1e-6)
    assert float(found[1, 1]) == 1
    cross = sum(float(a[i] @ b[0]) for i in range(3)) / 3
    assert float(found[0, 1]) == pytest.approx(cross, abs=1e-6) == float(found[1, 0])


def test_detect_and_compare_of_right_swapped_and_missing() -> None:
    """Two concepts with one reference each at right angles: right 1, swapped -3, one missing 0."""
    references = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    truth = among_references(references)
    a, b = references[0][0], references[1][0]
    assert detect_and_compare(similarities([a, b], references), truth) == 1
    assert detect_and_compare(similarities([b, a], references), truth) == 1 - 4
    assert detect_and_compare(similarities([a, None], references), truth) == 0


def test_pairs() -> None:
    values = [3.0, 5.0, 11.0]
    assert pairwise(3, lambda i, j: abs(values[i] - values[j])) == (2 + 8 + 6) / 3
    assert pairwise(1, lambda i, j: 0.0) is None


def test_interval_is_students() -> None:
    values = [0.2, 0.5, 0.6, 0.9]
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))  # type: ignore[operator]
    assert interval([1.0, 2.0])[1] == pytest.approx(12.7062 * sqrt(0.5) / sqrt(2), rel=1e-4)
    assert interval([7.0]) == (7.0, None)


def test_the_table_counts_every_prompt_the_same() -> None:
    rows = {(row.measure, row.concept): row for row in summarise([evaluation()])}
    assert rows["prompt_agreement", ""].mean == pytest.approx(0.25)
    assert rows["found", "a"].mean == pytest.approx((1 + 0.5) / 2)
    assert rows["found", "all"].mean == pytest.approx((3 / 4 + 0.5) / 2)
    assert rows["dino", "a"].mean == pytest.approx((0.7 + 0.9) / 2)
    assert rows["dino", "all"].mean == pytest.approx(((0.8 + 0.6 + 0.5) / 3 + 0.9) / 2)
    assert rows["dino", "b"].ends is None and rows["dino", "b"].values == 1
    low, high = rows["1_minus_dino", ""].ends or (9, 9)
    assert low == 0 and high == pytest.approx(0.3 + 12.7062 * 0.1, rel=1e-4)  # none is below 0
    assert rows["mixed", "all"].ends == (0, 1)
    both = {(row.measure, row.concept): row for row in summarise([evaluation(), evaluation()])}
    assert ("dino", "a") not in both and both["dino", "all"].values == 8
    assert both["dino", "all"].mean == pytest.approx(rows["dino", "all"].mean)


def test_the_order_of_pictures() -> None:
    """By identity, a concept that was not found counts as 0: (.8 + 0) / 2, (.6 + .5) / 2, .9, 0."""
    orders = rankings(evaluation())
    by_identity = [((s.prompt, s.seed), value) for s, value in orders["identity, DINO"]]
    assert [place for place, _ in by_identity] == [(1, 4), (0, 5), (0, 4), (1, 5)]
    assert [value for _, value in by_identity] == pytest.approx([0.9, 0.55, 0.4, 0])
    assert [s.seed for s, _ in orders["prompt agreement"]] == [4, 4, 5, 5]
    order = orders["prompt agreement"]
    for count in range(5):
        best, worst = extremes(order[:count], 3)
        assert len(best) + len(worst) == count and not {id(p) for p in best} & {
            id(p) for p in worst
        }
        if worst:
            assert worst[0] == order[:count][-1]


def test_csv_and_table_hold_the_numbers() -> None:
    import csv

    of = evaluation()
    lines = list(csv.DictReader(pictures_csv(of).splitlines()))
    assert lines[1]["text"] == "a <a> and a <b>" and lines[1]["file"] == (
        "pictures/prompt_01_seed_5.png"
    )
    assert float(lines[1]["dino:b"]) == 0.5 and lines[3]["dino:a"] == "" == lines[2]["found:b"]
    prompts = list(csv.DictReader(prompts_csv(of).splitlines()))
    assert float(prompts[0]["dino:a"]) == pytest.approx(0.7)
    assert float(prompts[1]["1_minus_dino"]) == 0.4
    rows = summarise([of])
    summary = list(csv.DictReader(summary_csv(rows).splitlines()))
    assert [float(line["mean"]) for line in summary] == [row.mean for row in rows]
    assert summary[0]["low"] == str(rows[0].ends[0])  # type: ignore[index]
    assert "identity, DINO       all      0.767" in table(rows)


def test_nothing_to_measure_with() -> None:
    with pytest.raises(UserError, match="nothing to measure with"):
        Instruments()
