"""The losses against their formulas written out."""

import pytest
import torch

from em_core.method import losses

ONES = torch.ones(3)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(3, 4, 5, 6, generator=g), torch.randn(3, 4, 5, 6, generator=g)
    return prediction, target, (torch.rand(3, 1, 5, 6, generator=g) > 0.6).float()


def test_masked_loss_as_in_break_a_scene() -> None:
    prediction, target, mask = tensors()
    expected = sum(
        float(mask[b, 0, y, x]) * float(prediction[b, c, y, x] - target[b, c, y, x]) ** 2
        for b in range(3) for c in range(4) for y in range(5) for x in range(6)
    ) / (3 * 4 * 5 * 6)  # fmt: skip
    found = losses.masked_diffusion_loss(prediction, target, mask, ONES, "mean")
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_area_normalised_loss_is_the_mean_error_inside_the_mask() -> None:
    prediction, target, mask = tensors()
    inside = [(prediction - target)[b][:, mask[b, 0] > 0].square().mean() for b in range(3)]
    found = losses.masked_diffusion_loss(prediction, target, mask, ONES, "area")
    torch.testing.assert_close(found, torch.stack(inside).mean())


@pytest.mark.parametrize("loss", ["plain", "mean", "area"])
def test_each_sample_counts_by_its_weight(loss: str) -> None:
    """The loss of a batch is the mean of its samples' own losses, each times its weight."""
    prediction, target, mask = tensors()
    weight = torch.tensor([0.5, 2.0, 0.0])

    def loss_of(rows: slice, weight: torch.Tensor) -> torch.Tensor:
        if loss == "plain":
            return losses.diffusion_loss(prediction[rows], target[rows], weight)
        return losses.masked_diffusion_loss(
            prediction[rows], target[rows], mask[rows], weight, loss
        )

    alone = torch.stack([loss_of(slice(b, b + 1), torch.ones(1)) for b in range(3)])
    torch.testing.assert_close(loss_of(slice(None), weight), (weight * alone).mean())


def test_a_full_mask_is_the_plain_loss() -> None:
    prediction, target, mask = tensors()
    whole = torch.ones_like(mask)
    for normalisation in ("mean", "area"):
        found = losses.masked_diffusion_loss(prediction, target, whole, ONES, normalisation)
        torch.testing.assert_close(found, losses.diffusion_loss(prediction, target, ONES))


def test_an_empty_mask_gives_zero_and_a_finite_gradient() -> None:
    prediction, target, mask = tensors()
    prediction.requires_grad_()
    loss = losses.masked_diffusion_loss(prediction, target, torch.zeros_like(mask), ONES, "area")
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_attention_loss_counts_present_concepts_only() -> None:
    g = torch.Generator().manual_seed(1)
    maps, masks = (
        torch.rand(2, 3, 4, 4, generator=g),
        (torch.rand(2, 3, 4, 4, generator=g) > 0.5).float(),
    )
    present = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    expected = torch.zeros(())
    for b in range(2):
        for k in range(3):
            C = maps[b, k] / maps[b, k].max()
            expected += present[b, k] * ((masks[b, k] - C) ** 2).mean() / 2
    torch.testing.assert_close(losses.attention_loss(maps, masks, present), expected)


def test_attention_gradient_passes_through_the_maximum() -> None:
    """d/dA of (A / max A): the maximum's own entry stays at 1, so pulling it down must move the others."""
    maps = torch.tensor([[[[2.0, 1.0]]]], requires_grad=True)
    losses.attention_loss(maps, torch.zeros(1, 1, 1, 2), torch.ones(1, 1)).backward()
    # L = (1 + (a/m)^2) / 2 with m=2, a=1: dL/da = a/m^2 = 1/4, dL/dm = -a^2/m^3 = -1/8
    torch.testing.assert_close(maps.grad, torch.tensor([[[[-0.125, 0.25]]]]))


def test_end_of_text_regulariser_does_not_move_the_anchor() -> None:
    maps, end = (
        torch.rand(1, 2, 4, 4, requires_grad=True),
        torch.rand(1, 1, 4, 4, requires_grad=True),
    )
    losses.end_of_text_regulariser(maps, end, torch.ones(1, 2)).backward()
    assert end.grad is None and maps.grad.abs().sum() > 0
    same = losses.end_of_text_regulariser(end.expand(1, 2, 4, 4) * 0.3, end, torch.ones(1, 2))
    assert float(same.detach()) == pytest.approx(0, abs=1e-12)
