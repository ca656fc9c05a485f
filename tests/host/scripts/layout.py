"""Masks on the concepts' attention, in whole samplings of ComfyUI: where each column may act, and how often
that is computed.

The oracle says for every spot of every layer whether its middle lies inside the mask, in the picture.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from inside import import_pack, part, start_comfyui

start_comfyui()
import_pack()

import comfy.sample  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402

layout, application = part("nodes.host.layout"), part("nodes.host.application")
UserError = part("em_core.errors").UserError
TEXT = "a photo of <rex> and <doll> on grass"
REX, DOLL = (4, 5), (7, 8)  # two vectors each, after "<start> a photo of"
LEFT = torch.zeros(64, 64)
LEFT[:, :32] = 1
TOP = LEFT.T.contiguous()
OPTIONS = dict[str, Any]


def written_out() -> None:
    """Masked attention against a softmax written out, alone and on top of another patch."""
    g = torch.Generator().manual_seed(0)
    heads, width, tokens, size = 2, 8, 12, (4, 6)
    q = torch.randn(3, size[0] * size[1], heads * width, generator=g)
    k, v = (torch.randn(3, tokens, heads * width, generator=g) for _ in range(2))
    masks = {"rex": torch.zeros(8, 12), "doll": torch.ones(8, 12)}
    masks["rex"][:, :6] = 1
    placed = layout.Layout(masks)
    note = layout.Note(layout.Columns((("rex", (3, 4)), ("doll", (7,))), tokens))
    options: OPTIONS = {"n_heads": heads, "original_shape": [3, 4, 8, 12], placed.key: note,
                        "activations_shape": [3, 16, *size]}  # fmt: skip

    def softmax(shut: bool) -> torch.Tensor:
        split = [x.reshape(3, -1, heads, width).transpose(1, 2) for x in (q, k, v)]
        logits = split[0] @ split[1].transpose(-1, -2) * width**-0.5
        if shut:
            outside = (torch.arange(24) % 6) >= 3
            logits[:, :, outside, 3:5] = -torch.inf
        return (logits.softmax(-1) @ split[2]).transpose(1, 2).reshape(3, -1, heads * width)

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    attend = layout.attend_inside(placed, None)
    close(attend(q, k, v, options), softmax(True))
    without = {name: x for name, x in options.items() if name != placed.key}
    close(attend(q, k, v, without), softmax(False))
    chained = layout.attend_inside(placed, lambda q, k, v, options: softmax(False) + 0.25)
    close(chained(q, k, v, options), softmax(True) + 0.25)
    override = {"optimized_attention_override": lambda f, *args, **named: f(*args, **named) + 0.5}
    close(attend(q, k, v, options | override), softmax(True) + 0.5)
    assert not torch.allclose(softmax(True), softmax(False))


def concepts(*names: str) -> Any:
    """Concepts of two random vectors each."""
    widths = part("nodes.host.families").encoder_widths(clip)
    g = torch.Generator().manual_seed(len(names[0]))
    vectors = {
        name: {e: torch.randn(2, width, generator=g) * 0.02 for e, width in widths.items()}
        for name in names
    }
    identity = part("em_core.model.identity").ModelIdentity("sd", "", widths, torch.zeros(1))
    made = tuple(part("em_core.prompts").Concept(name) for name in names)
    return part("em_core.runs.concept_set").ConceptSet(made, vectors, identity)


def encode(clip: Any, text: str) -> Any:
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def seen_masks(model: Any, positive: Any, size: tuple[int, int] = (32, 32), steps: int = 1) -> Any:
    """What every cross-attention adds to its logits while ComfyUI samples: [(size of the layer, bias)]."""
    found = []

    def look(function: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or {}
        if kwargs.get("mask") is not None:
            found.append((tuple(options["activations_shape"][-2:]), kwargs["mask"].clone()))
        return function(*args, **kwargs)

    watched = model.clone()
    watched.model_options["transformer_options"]["optimized_attention_override"] = look
    empty = encode(clip, "")
    comfy.sample.sample(
        watched, torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0)), steps, 2.0, "euler",
        "normal", positive, empty, torch.zeros(1, 4, *size), disable_pbar=True,
    )  # fmt: skip
    return found


def agrees(
    found: Any,
    columns: dict[str, tuple[int, ...]],
    region: tuple[float, float, float, float] = (0, 0, 1, 1),
    tokens: int = 77,
    count: int = 7,
    blurred: float = 0.0,
) -> None:
    """Every layer's bias is what the masks say: rex on the left, doll at the top of the whole picture.

    `region` is (top, left, bottom, right) of what is sampled, in shares of the picture; spots nearer than
    `blurred` to a mask's edge may go either way.
    """
    assert len(found) >= count, len(found)
    top, left, bottom, right = region
    for (height, width), bias in found:
        y = top + (torch.arange(height) + 0.5) / height * (bottom - top)
        x = left + (torch.arange(width) + 0.5) / width * (right - left)
        middle = {"rex": x.expand(height, width), "doll": y[:, None].expand(height, width)}
        assert bias.shape[-2:] == (height * width, tokens), (bias.shape, height, width)
        expected = torch.zeros(height * width, tokens)
        sure = torch.ones(height * width, tokens, dtype=torch.bool)
        for name, positions in columns.items():
            for position in positions:
                expected[:, position] = (middle[name] > 0.5).flatten() * -1e4
                sure[:, position] = ((middle[name] - 0.5).abs() > max(blurred, 1e-6)).flatten()
        assert torch.equal(bias[sure], expected[sure]), (height, width)


BOTH = {"rex": REX, "doll": DOLL}
CASES: dict[str, Callable[[], None]] = {"written_out": written_out}


def case(run: Callable[[], None]) -> Callable[[], None]:
    CASES[run.__name__] = run
    return run


@case
def whole_picture() -> None:
    agrees(seen_masks(ours, encode(known, TEXT)), BOTH)
    wide = seen_masks(ours, encode(known, TEXT), (23, 41))
    agrees(wide, BOTH, blurred=0.1)
    assert not seen_masks(ours, encode(known, "a photo of grass"))
    assert not seen_masks(ours, encode(clip, "a photo of grass"))


@case
def once_per_size() -> None:
    """Not in each layer of each call; and nothing is kept when the sampling is over."""
    computed = []
    real = layout.shut_off
    layout.shut_off = lambda *args: computed.append(args[3]) or real(*args)
    try:
        found = seen_masks(ours, encode(known, TEXT), steps=3)
    finally:
        layout.shut_off = real
    assert len(computed) == len(set(computed)) == len({size for size, _ in found}) < len(found) / 3
    assert not placed_on(ours).memory.biases


def placed_on(model: Any) -> Any:
    """The layout of a MODEL."""
    (wrapper,) = model.get_all_wrappers("outer_sample")
    return next(c.cell_contents for c in wrapper.__closure__)


@case
def deep_shrink() -> None:
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale as node

    for factor in (2.0, 1.5):
        made = node.execute(ours, 3, factor, 0.0, 1.0, True, "bicubic", "bicubic")
        model = (made if isinstance(made, tuple) else made.result)[0]
        found = seen_masks(model, encode(known, TEXT), (38, 30))
        agrees(found, BOTH, blurred=0.1)
        plain = seen_masks(ours, encode(known, TEXT), (38, 30))
        assert {size for size, _ in found} != {size for size, _ in plain}


@case
def areas() -> None:
    """The masks are of the whole picture, and the part of them in the area acts."""
    text = encode(known, TEXT)
    (area,) = nodes.ConditioningSetArea().append(
        text, 128, 192, 64, 32, 1.0
    )  # w, h, x, y in pixels
    agrees(seen_masks(ours, area), BOTH, (4 / 32, 8 / 32, 28 / 32, 24 / 32), blurred=0.04)
    (share,) = nodes.ConditioningSetAreaPercentage().append(text, 0.5, 0.75, 0.25, 0.125, 1.0)
    agrees(seen_masks(ours, share), BOTH, (4 / 32, 8 / 32, 28 / 32, 24 / 32), blurred=0.04)
    where = torch.zeros(1, 256, 256)
    where[:, 32:224, 64:192] = 1
    (bounds,) = nodes.ConditioningSetMask().append(text, where, "mask bounds", 1.0)
    found = seen_masks(ours, bounds)
    assert {size for size, _ in found} & {(24, 16)}
    agrees(found, BOTH, (4 / 32, 8 / 32, 28 / 32, 24 / 32), blurred=0.04)
    (default,) = nodes.ConditioningSetMask().append(text, where, "default", 1.0)
    agrees(seen_masks(ours, default), BOTH)


@case
def joined() -> None:
    """Concept in the first text, in the second, in both; texts of one and of several chunks."""
    text, other = encode(known, TEXT), encode(known, "a star on sand")
    plain = encode(clip, "a heart on snow")

    def concat(first: Any, second: Any) -> Any:
        return nodes.ConditioningConcat().concat(first, second)[0]

    second = {"rex": tuple(77 + i for i in REX), "doll": tuple(77 + i for i in DOLL)}
    agrees(seen_masks(ours, concat(text, other)), BOTH, tokens=154)
    agrees(seen_masks(ours, concat(other, text)), second, tokens=154)
    both = {name: BOTH[name] + second[name] for name in BOTH}
    agrees(seen_masks(ours, concat(text, text)), both, tokens=154)
    third = {name: tuple(77 + i for i in second[name]) for name in second}
    agrees(seen_masks(ours, concat(concat(other, other), text)), third, tokens=231)
    agrees(seen_masks(ours, concat(plain, text)), second, tokens=154)


@case
def averaged() -> None:
    text, other = encode(known, TEXT), encode(known, "a star on sand")
    for share in (0.0, 0.3, 1.0):
        for pair in ((text, other), (other, text)):
            (mean,) = nodes.ConditioningAverage().addWeighted(*pair, share)
            found = seen_masks(ours, mean)
            if share == (0.0 if pair[0] is text else 1.0):
                assert not found  # nothing of the text with the concepts is left
            else:
                agrees(found, BOTH)


@case
def combined() -> None:
    one, two = encode(known, TEXT), encode(known, "<doll>")
    (both,) = nodes.ConditioningCombine().combine(one, two)
    found = seen_masks(ours, both)
    of_two = [one for one in found if not one[1][:, REX[0]].any()]
    agrees(of_two, {"doll": (1, 2)})
    agrees([one for one in found if one[1][:, REX[0]].any()], BOTH)


@case
def encoded_by_other_nodes() -> None:
    """Packs that encode on their own, some of them with word ids; values that another node changes."""
    for tokens in (known.tokenize(TEXT), known.tokenize(TEXT, return_word_ids=True)):
        text, pooled = known.encode_from_tokens(tokens, return_pooled=True)
        agrees(seen_masks(ours, [[text, {"pooled_output": pooled}]]), BOTH)
        told = known.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
        agrees(seen_masks(ours, [[told.pop("cond"), told]]), BOTH)
        alone = known.encode_from_tokens(tokens)
        agrees(seen_masks(ours, [[alone, {"pooled_output": pooled}]]), BOTH)
    scaled = [[text * 1.2, plain] for text, plain in encode(known, TEXT)]
    agrees(seen_masks(ours, scaled), BOTH)
    later = known.clone()
    later.clip_layer(-2)
    agrees(seen_masks(ours, encode(later, TEXT)), BOTH)


@case
def two_layouts() -> None:
    """Two Apply Concept Tokens after one another, each with its masks."""
    model, text = application.apply_concepts(model_, clip, concepts("rex"), 1.0, {"rex": LEFT})
    model, text = application.apply_concepts(model, text, concepts("doll"), 1.0, {"doll": TOP})
    found = seen_masks(model, encode(text, TEXT))
    agrees(found[::2], {"doll": DOLL})
    agrees(found[1::2], {"rex": REX})


@case
def no_part_of_a_key() -> None:
    """A run's key tells masks apart, and not what has been encoded and sampled with them."""
    digest = part("nodes.host.identity").models_digest
    find = part("nodes.host.families").identify

    def key(masks: dict[str, torch.Tensor], used: bool = False) -> str:
        model, text = application.apply_concepts(model_, clip, concepts("rex"), 1.0, masks)
        if used:
            seen_masks(model, encode(text, "a photo of <rex>"))
        return str(digest(find(model, clip, vae), []))

    assert key({"rex": LEFT}) == key({"rex": LEFT}, used=True) != key({"rex": TOP})


@case
def refusals() -> None:
    """Tiles and batches of different prompts, in words."""

    def tiled(run: Any, call: dict[str, Any]) -> Any:
        halves = [
            run(x.contiguous(), call["timestep"], **call["c"])
            for x in call["input"].chunk(2, dim=-1)
        ]
        return torch.cat(halves, dim=-1)

    in_tiles = ours.clone()
    in_tiles.set_model_unet_function_wrapper(tiled)
    refused("in tiles", lambda: seen_masks(in_tiles, encode(known, TEXT)))
    seen_masks(in_tiles, encode(known, "a photo of grass"))
    (one, plain), (two, _) = encode(known, TEXT)[0], encode(known, "<doll> on sand")[0]
    refused("batch of different", lambda: seen_masks(ours, [[torch.cat([one, two]), plain]]))


def refused(words: str, attempt: Callable[[], Any]) -> None:
    try:
        attempt()
    except UserError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {words}")


with torch.inference_mode():
    model_, clip, vae = part("nodes.host.demo_model").load_demo_model(
        part("em_core.demo").model_path()
    )
    ours, known = application.apply_concepts(
        model_, clip, concepts("rex", "doll"), 1.0, {"rex": LEFT, "doll": TOP}
    )
    for name in os.environ.get("CASES", "").split() or list(CASES):
        CASES[name]()
        sys.stdout.write(f"{name} is fine\n")
