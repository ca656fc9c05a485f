"""Masked cross-attention against a softmax written out."""

import sys

from inside import import_pack, part, start_comfyui

start_comfyui()
import_pack()

import torch  # noqa: E402

layout = part("nodes.host.layout")
g = torch.Generator().manual_seed(0)
heads, width, tokens, size = 2, 8, 12, (4, 6)
q = torch.randn(3, size[0] * size[1], heads * width, generator=g)
k, v = (torch.randn(3, tokens, heads * width, generator=g) for _ in range(2))
masks = {"rex": torch.zeros(8, 12), "doll": torch.ones(8, 12)}
masks["rex"][:, :6] = 1
note = layout.Columns((("rex", (3, 4)), ("doll", (7,)), ("stranger", (9,))))
options = {"n_heads": heads, "original_shape": [3, 4, 8, 12], layout.NOTE: note}


def written_out(shut: bool) -> torch.Tensor:
    split = [x.reshape(3, -1, heads, width).transpose(1, 2) for x in (q, k, v)]
    logits = split[0] @ split[1].transpose(-1, -2) * width**-0.5
    if shut:
        outside = (torch.arange(24) % 6) >= 3
        logits[:, :, outside, 3:5] = -torch.inf
    return (logits.softmax(-1) @ split[2]).transpose(1, 2).reshape(3, -1, heads * width)


attend = layout.attend_inside(masks, None)
torch.testing.assert_close(attend(q, k, v, options), written_out(True), atol=1e-5, rtol=1e-4)
without_note = {name: x for name, x in options.items() if name != layout.NOTE}
torch.testing.assert_close(attend(q, k, v, without_note), written_out(False), atol=1e-5, rtol=1e-4)
chained = layout.attend_inside(masks, lambda q, k, v, options: written_out(False) + 0.25)
torch.testing.assert_close(
    chained(q, k, v, options), written_out(True) + 0.25, atol=1e-5, rtol=1e-4
)
override = {"optimized_attention_override": lambda f, *args, **named: f(*args, **named) + 0.5}
torch.testing.assert_close(
    attend(q, k, v, options | override), written_out(True) + 0.5, atol=1e-5, rtol=1e-4
)
assert not torch.allclose(written_out(True), written_out(False))
sys.stdout.write("fine\n")
