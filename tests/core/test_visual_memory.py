"""Bytes of a run that learns a visual condition, against a count of what autograd keeps."""

from dataclasses import replace

import pytest
import torch

from em_core.model.anatomy import (
    Anatomy,
    Autoencoder,
    Job,
    Resampling,
    Residual,
    Sight,
    Spending,
    Stage,
    TextEncoder,
    Transformer,
)
from em_core.model.image_attention import image_attention, init_block
from em_core.model.memory import GIB
from em_core.model.visual_memory import block_bytes, image_stages, needs_of


def sd1() -> Anatomy:
    """SD 1.x's stages in the order in which they run."""
    stages: list[Stage] = []
    widths, skips, now = (320, 640, 1280, 1280), [320], 320
    for level, c in enumerate(widths):
        for _ in range(2):
            stages.append(Residual(now, c, level, skipped=level == 3))
            now = c
            skips.append(c)
            if level < 3:
                stages.append(Transformer(c, 1, 8, 768, level, skipped=True))
        if level < 3:
            stages.append(Resampling(c, level, skipped=True))
            skips.append(c)
    stages += [Residual(1280, 1280, 3), Transformer(1280, 1, 8, 768, 3), Residual(1280, 1280, 3)]
    for level in (3, 2, 1, 0):
        for _ in range(3):
            stages.append(Residual(now + skips.pop(), widths[level], level))
            now = widths[level]
            if level < 3:
                stages.append(Transformer(now, 1, 8, 768, level))
        if level:
            stages.append(Resampling(now, level - 1))
    text = TextEncoder(768, 12, 246_000_000, 123_000_000, quick=True)
    vae = Autoencoder(bytes=168_000_000, channels=128, compute=2, factor=8)
    return Anatomy(tuple(stages), 859_000_000, 500_000, (text,), 0, 0, vae)


def test_image_attention_stands_where_vico_has_it() -> None:
    first, places = image_stages(sd1())
    assert [(p.channels, p.level) for p in places] == [(1280, 2), (640, 1), (640, 1), (320, 0)]
    assert sd1().stages[first] == places[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_keeps_what_is_counted(batch: int) -> None:
    """What autograd saves of a block in float32, each storage once, without the parameters."""
    c, heads, side = 64, 4, 16
    g = torch.Generator().manual_seed(0)
    p = {n: v.requires_grad_() for n, v in init_block(c, g, zero=False).items()}
    x = torch.randn(batch, side**2, c, generator=g, requires_grad=True)
    reference, kept = torch.randn(batch, side**2, c, generator=g), {}
    own = {v.untyped_storage().data_ptr() for v in p.values()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = x + image_attention(x, reference, p, heads)
    assert out.requires_grad
    counted = sum(kept.values()) - reference.numel() * 4
    place = Transformer(c, 1, heads, 768, 0)
    estimated = block_bytes(place, Spending(compute=4), Job(side, side, batch=batch))
    assert estimated == pytest.approx(counted, rel=0.15)


def test_sd1_at_512_px_fits_6_gib() -> None:
    """In bf16, with one concept and one sample per step; the published way keeps the references' pass too."""
    job, half = Job(64, 64, batch=1), Spending(2, 2)
    plain = needs_of(sd1(), half, job)
    ours = needs_of(sd1(), half, replace(job, sight=Sight()))
    published = needs_of(sd1(), half, replace(job, sight=Sight(tokens=True, joined=True)))
    assert ours.trained == published.trained == 16 * 51_248_960
    assert plain.device < ours.device < published.device < 6 * GIB
    two = needs_of(sd1(), half, replace(job, sight=Sight(concepts=2)))
    assert two.trained == 2 * ours.trained and two.saved > ours.saved
