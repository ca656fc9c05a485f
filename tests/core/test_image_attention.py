"""Image attention against a plain block written from the paper, ViCo's Otsu against brute force and
scikit-image, and where the blocks stand."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from skimage.filters import threshold_otsu
from torch import nn

from em_core.hosts.attention import attention_layers
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.thresholds import otsu_of_tenths
from em_core.model.image_attention import image_attention, init_block, shapes
from em_core.model.visual import gates, image_places, init_blocks, keys_under


class PlainBlock(nn.Module):
    """A whole transformer block as the paper draws it, with PyTorch's own layers and softmax."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(3))
        self.maps = nn.ModuleList(
            nn.ModuleList([*(nn.Linear(c, c, bias=False) for _ in range(3)), nn.Linear(c, c)])
            for _ in range(2)
        )
        self.wide, self.narrow = nn.Linear(c, 8 * c), nn.Linear(4 * c, c)

    def attention(
        self, maps: nn.ModuleList, x: torch.Tensor, to: torch.Tensor, seen
    ) -> torch.Tensor:  # type: ignore[no-untyped-def]
        q, k, v = maps[0](x), maps[1](to), maps[2](to)
        out = []
        for one in range(self.heads):
            d = q.shape[-1] // self.heads
            part = slice(one * d, (one + 1) * d)
            logits = q[..., part] @ k[..., part].mT / d**0.5
            if seen is not None:
                logits = logits.masked_fill(~seen[:, None, :], -torch.finfo(logits.dtype).max)
            out.append(logits.softmax(-1) @ v[..., part])
        return maps[3](torch.cat(out, dim=-1))

    def forward(self, x: torch.Tensor, reference: torch.Tensor, seen) -> torch.Tensor:  # type: ignore[no-untyped-def]
        y = self.norms[0](x)
        x = x + self.attention(self.maps[0], y, y, None)
        x = x + self.attention(self.maps[1], self.norms[1](x), reference, seen)
        a, b = self.wide(self.norms[2](x)).chunk(2, dim=-1)
        return x + self.narrow(a * nn.functional.gelu(b))

    def values(self) -> dict[str, torch.Tensor]:
        found = {}
        for n in (1, 2):
            names = ("to_q", "to_k", "to_v", "to_out")
            for name, layer in zip(names, self.maps[n - 1], strict=True):
                found |= {f"attn{n}.{name}.{k}": x for k, x in layer.named_parameters()}
        for n, norm in enumerate(self.norms, start=1):
            found |= {f"norm{n}.{k}": x for k, x in norm.named_parameters()}
        for name, layer in (("ff.gate", self.wide), ("ff.out", self.narrow)):
            found |= {f"{name}.{k}": x for k, x in layer.named_parameters()}
        return found


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_the_papers(masked: bool) -> None:
    """Values and gradients, each sample with a mask of its own."""
    torch.manual_seed(0)
    plain = PlainBlock(24, 3)
    for norm in plain.norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, reference = torch.randn(4, 10, 24), torch.randn(4, 7, 24, requires_grad=True)
    seen = torch.rand(4, 7) > 0.5 if masked else None
    expected = plain(x, reference, seen)
    values = plain.values()
    assert set(values) == set(shapes(24))
    found = x + image_attention(x, reference, values, 3, seen)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = [*values.values(), reference]
    grads = torch.autograd.grad(found.square().sum(), wanted)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected.square().sum(), wanted), atol=2e-3, rtol=1e-4
    )


def test_only_what_is_seen_counts() -> None:
    """Leaving pixels out and masking them is the same."""
    g = torch.Generator().manual_seed(0)
    p, x = init_block(16, g, zero=False), torch.randn(2, 9, 16, generator=g)
    reference, seen = torch.randn(1, 12, 16, generator=g), torch.arange(12) % 3 == 0
    masked = image_attention(x, reference, p, 2, seen[None])
    torch.testing.assert_close(masked, image_attention(x, reference[:, seen], p, 2))
    assert not torch.allclose(masked, image_attention(x, reference, p, 2))


def test_zero_outputs_add_nothing_and_learn() -> None:
    g = torch.Generator().manual_seed(0)
    p = {n: v.requires_grad_() for n, v in init_block(16, g, zero=True).items()}
    x, reference = torch.randn(2, 9, 16, generator=g), torch.randn(2, 5, 16, generator=g)
    added = image_attention(x, reference, p, 2)
    assert not added.any() and torch.equal(x + added, x)
    added.sum().backward()
    assert p["attn2.to_out.weight"].grad is not None and p["attn2.to_out.weight"].grad.any()


def brute_force(levels: list[float]) -> list[bool]:
    """Otsu over t / 10 with true means, the first best one."""
    low, high = min(levels), max(levels)
    scaled = [(x - low) / (high - low) for x in levels]
    best, chosen = -1.0, 0.0
    for t in range(10):
        below, above = [x for x in scaled if x < t / 10], [x for x in scaled if x >= t / 10]
        between = 0.0
        if below and above:
            apart = sum(below) / len(below) - sum(above) / len(above)
            between = len(below) * len(above) * apart**2
        if between > best:
            best, chosen = between, t / 10
    return [x >= chosen for x in scaled]


def test_otsu_is_brute_force() -> None:
    g = torch.Generator().manual_seed(0)
    kinds = (torch.rand(20, 6, 7, generator=g), torch.rand(20, 6, 7, generator=g) ** 6 * 3 - 1)
    for maps in kinds:
        maps = maps.double()
        found = otsu_of_tenths(maps)
        assert found.shape == maps.shape
        for one, mask in zip(maps, found, strict=True):
            assert mask.flatten().tolist() == brute_force(one.flatten().tolist())


def test_otsu_of_ten_levels_is_scikit_images() -> None:
    """Where every split of the levels lies between two tenths, the definitions coincide."""
    g = torch.Generator().manual_seed(1)
    for _ in range(30):
        odds = torch.rand(10, generator=g) ** 2 + 0.01
        levels = torch.multinomial(odds, 300, replacement=True, generator=g)
        levels[:2] = torch.tensor([0, 9])
        image = levels.reshape(15, 20)
        expected = image > int(threshold_otsu(image.numpy()))
        assert torch.equal(otsu_of_tenths(image / 9), expected)


def test_otsu_keeps_what_equals_it_and_constant_maps() -> None:
    maps = torch.tensor([[0.0, 0.0, 0.5, 1.0]])  # 0.1 .. 0.5 split alike: the first one counts
    assert otsu_of_tenths(maps).tolist() == [[False, False, True, True]]
    equal = torch.tensor([[0.0, *[0.45] * 500, *[0.5] * 500, 1.0]])
    assert otsu_of_tenths(equal)[0].sum() == 501  # 0.5 is the threshold, and stays
    assert otsu_of_tenths(torch.full((2, 3, 3), 0.7)).all()


def test_keys_of_a_mask_are_never_none() -> None:
    mask = torch.zeros(16, 16)
    mask[3, 5] = 1
    found = keys_under(mask, (4, 4))
    assert found.nonzero().flatten().tolist() == [1]
    mask[:8] = 1
    assert keys_under(mask, (4, 4)).reshape(4, 4)[:, 0].tolist() == [True, True, False, False]


def test_gates_share_the_pixels() -> None:
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 20, generator=g)
    found = gates(maps)[..., 0]
    C = maps / maps.amax(dim=-1, keepdim=True)
    torch.testing.assert_close(gates(maps[:, :1])[..., 0], C[:, :1])
    assert float(found.sum(dim=1).max()) <= 1 + 1e-6
    torch.testing.assert_close(found[1, 2, 7], C[1, 2, 7] ** 2 / C[1, :, 7].sum())


SD1 = dict(
    block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
)  # fmt: skip
SD2 = SD1 | dict(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
SDXL = dict(
    block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def up(block: int, attention: int, depth: int = 0) -> str:
    return f"up_blocks.{block}.attentions.{attention}.transformer_blocks.{depth}.attn2"


@pytest.mark.parametrize(
    ("config", "names", "channels", "sizes"),
    [
        (SD1, [up(1, 1), up(2, 0), up(2, 2), up(3, 1)], [1280, 640, 640, 320], [16, 32, 32, 64]),
        (SD2, [up(1, 1), up(2, 0), up(2, 2), up(3, 1)], [1280, 640, 640, 320], [16, 32, 32, 64]),
        (SDXL, [up(0, 1, 9), up(1, 0, 1), up(1, 2, 1)], [1280, 640, 640], [16, 32, 32]),
    ],
    ids=["sd1", "sd2", "sdxl"],
)
def test_places_at_full_size(
    config: dict, names: list[str], channels: list[int], sizes: list[int]
) -> None:
    """ViCo's places, and its 51.3 million parameters at SD 1.x's size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **config)
    places = image_places(attention_layers(unet, (64, 64)), unet)
    assert [place.name for place in places] == names
    assert [place.channels for place in places] == channels
    assert [place.size for place in places] == [(side, side) for side in sizes]
    count = sum(torch.Size(shape).numel() for p in places for shape in shapes(p.channels).values())
    assert count == sum(20 * c * c + 17 * c for c in channels)
    if config is SD1:
        assert count == 51_248_960
        assert [place.channels // place.heads for place in places] == [160, 80, 80, 40]


def test_places_of_the_demo_model(host: DiffusersHost) -> None:
    places = host.image_places((16, 16))
    assert [(p.name, p.size) for p in places] == [(up(0, 1), (8, 8)), (up(1, 1), (16, 16))]
    values = init_blocks(places, ["rex"], torch.Generator(), zero=True)
    assert sum(v.numel() for v in values.values()) == sum(
        20 * p.channels**2 + 17 * p.channels for p in places
    )
