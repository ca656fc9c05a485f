"""A visual condition while diffusers draws, its file, and input that is bad."""

from dataclasses import replace
from pathlib import Path

import pytest
import small_models
import torch
from equality import differences
from test_image_attention import PlainBlock

from em_core.errors import Notice, UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.visual import looking
from em_core.masks.resizing import resize
from em_core.model.visual import init_blocks, keys_under
from em_core.model.visual_drawing import Reference, Seen, SeenCache, VisualUse
from em_core.prompts import Concept, ConceptPrompt
from em_core.runs.concept_set import ConceptSet
from em_core.runs.visual import with_reference
from em_core.runs.visual_condition import VisualCondition
from em_core.settings import VisualSettings

PROMPT = "a photo of <rex> and <doll> on sand"
STEPS = 3
# Of diffusers' Euler scheduler with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def condition_of(
    host: DiffusersHost, example: Example, zero: bool = False, **settings: object
) -> VisualCondition:
    """Random image attention that looks at the example's true masks."""
    generator = torch.Generator().manual_seed(0)
    words = {c.name: c.words for c in example.prompt.concepts}
    vectors = {n: dict(host.initial_vectors(w, 1, generator)) for n, w in words.items()}
    known = tuple(Concept(*item) for item in words.items())
    concepts = ConceptSet(known, vectors, host.identity(), settings={"em": {}})
    blocks = init_blocks(host.image_places((16, 16)), list(words), generator, zero)
    latent = host.encode_image(example.picture[None] * 2 - 1)[0]
    reference = Reference(latent, dict(example.truth))
    return VisualCondition(concepts, blocks, (reference,), VisualSettings(**settings))  # type: ignore[arg-type]


def draw(
    host: DiffusersHost, condition: VisualCondition | None, prompt: str = PROMPT, **options: object
):  # type: ignore[no-untyped-def]
    return host.generate(prompt, seeds=[0, 1], steps=STEPS, condition=condition, **options)


def test_strength_0_and_a_new_condition_are_the_model(
    host: DiffusersHost, example: Example
) -> None:
    """Bit for bit; and something else at strength 1, in the part of the sampling that is asked for."""
    condition = condition_of(host, example)
    plain = draw(host, None, concepts=condition.concepts)
    assert torch.equal(draw(host, condition, strength=0.0), plain)
    assert torch.equal(draw(host, condition_of(host, example, zero=True)), plain)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.unet.modules()]
    assert not any(hooks)
    full, late = draw(host, condition), draw(host, condition, span=(0.9, 1.0))
    assert not torch.allclose(full, plain, atol=1e-2)
    assert 0 < (late - plain).abs().mean() < (full - plain).abs().mean()
    alone = host.generate(PROMPT, seeds=[1], steps=STEPS, condition=condition)
    torch.testing.assert_close(alone[0], full[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("own", [False, True], ids=["ours", "vico"])
@torch.no_grad()
def test_a_pass_is_written_out(host: DiffusersHost, example: Example, own: bool) -> None:
    """Both halves of guidance, with two concepts: gates by the conditional prompt's keys, keys under the
    masks; ViCo's way has neither gates nor a common prompt."""
    settings = {"gated": not own, "own_prompts": own}
    condition, t = condition_of(host, example, **settings), torch.full((2,), 400.0)
    names = condition.names
    prompts = [ConceptPrompt(()), ConceptPrompt.parse(PROMPT)]
    encoded = host.encode_prompts(prompts, condition.concepts.vectors)
    Z_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with looking(host, condition.use(0.7), encoded, 1):
        found = host.predict(Z_t, t, encoded)
        apart = [host.predict(Z_t[i : i + 1], t[:1], encoded.rows([i])) for i in (0, 1)]
    places = host.image_places((16, 16))
    if not own:  # halves in separate calls see the same
        torch.testing.assert_close(torch.cat(apart), found, atol=1e-5, rtol=1e-4)
    caught: dict[str, torch.Tensor] = {}

    def keep(path: str):  # type: ignore[no-untyped-def]
        return host.unet.get_submodule(path).register_forward_hook(
            lambda module, args, out: caught.__setitem__(path, out)
        )

    features, keys = {}, {}
    for half in (0, 1):
        paths = [p for place in places for p in (place.block, f"{place.name}.to_k")]
        handles = [keep(path) for path in paths]
        host.predict(condition.references[0].latent[None], t[:1], encoded.rows([half]))
        for handle in handles:
            handle.remove()
        for place in places:
            features[half, place.name] = caught[place.block]
            keys[half, place.name] = caught[f"{place.name}.to_k"]

    def plain(number: int):  # type: ignore[no-untyped-def]
        place = places[number]

        def hook(module, args, x):  # type: ignore[no-untyped-def]
            out = x.clone()
            for half in (0, 1):
                source = half if own else 1
                q = caught[f"{place.name}.to_q"][half]
                split = [y.unflatten(-1, (place.heads, -1)) for y in (q, keys[1, place.name][0])]
                logits = torch.einsum("qhd,thd->hqt", *split) / split[0].shape[-1] ** 0.5
                A = logits.softmax(-1).mean(0)
                columns = encoded.streams["text"].columns[1]
                C = torch.stack([A[:, columns[n][0]] for n in names])
                C = C / C.amax(dim=1, keepdim=True)
                for i, name in enumerate(names):
                    block = PlainBlock(place.channels, place.heads)
                    for key, value in block.values().items():
                        value.copy_(condition.blocks[f"{name}/{number}/{key}"])
                    small = resize(example.truth[name].float(), place.size, "mask")
                    seen = (small > 0.5).flatten()[None]
                    one = x[half : half + 1]
                    change = block(one, features[source, place.name], seen) - one
                    gate = 1.0 if own else (C[i] ** 2 / C.sum(0))[None, :, None]
                    out[half : half + 1] += 0.7 * gate * change
            return out

        return hook

    handles = [keep(f"{place.name}.to_q") for place in places]
    for number, place in enumerate(places):
        block = host.unet.get_submodule(place.block)
        handles.append(block.register_forward_hook(plain(number)))
    expected = host.predict(Z_t, t, encoded)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, host.predict(Z_t, t, encoded), atol=1e-3)


def test_several_references(host: DiffusersHost, example: Example) -> None:
    """The same reference twice is one, since its keys share the softmax; another one counts."""
    condition = condition_of(host, example)
    (first,) = condition.references
    twice = draw(host, replace(condition, references=(first, first)))
    torch.testing.assert_close(twice, draw(host, condition), atol=1e-4, rtol=1e-3)
    mirrored = Reference(first.latent.flip(-1), {n: m.flip(-1) for n, m in first.masks.items()})  # type: ignore[union-attr]
    both = draw(host, replace(condition, references=(first, mirrored)))
    assert not torch.allclose(both, twice, atol=1e-3)


def test_only_the_prompts_concepts_act(host: DiffusersHost, example: Example) -> None:
    condition, prompt = condition_of(host, example), "a photo of <rex> on sand"
    of_rex = {n: v for n, v in condition.blocks.items() if n.startswith("rex/")}
    alone = draw(host, replace(condition, blocks=of_rex), prompt)
    assert torch.equal(draw(host, condition, prompt), alone)
    plain = draw(host, None, "a photo of a circle", concepts=condition.concepts)
    with pytest.warns(Notice, match="none of the visual condition's concepts"):
        assert torch.equal(draw(host, condition, "a photo of a circle"), plain)


def test_sdxl_of_little_width(example: Example) -> None:
    """Transformers of two blocks, two text encoders, and what the model is told of sizes."""
    host = DiffusersHost(small_models.sdxl())
    places = host.image_places((32, 32))
    assert [p.name for p in places] == ["up_blocks.0.attentions.1.transformer_blocks.1.attn2"]
    small = Example(example.picture, ConceptPrompt.parse("<rex:circle>"), truth={})
    small = replace(small, truth={"rex": example.truth["rex"]})
    condition = condition_of(host, small)
    options = {"seeds": [0], "steps": 2}
    plain = host.generate("<rex>", condition.concepts, **options)
    assert torch.equal(host.generate("<rex>", condition=condition, strength=0.0, **options), plain)
    assert not torch.equal(host.generate("<rex>", condition=condition, **options), plain)


def test_the_cache_is_bounded_and_asks_once() -> None:
    def make() -> Seen:
        made.append(1)
        return Seen({"place": {"rex": torch.zeros(5, 10)}}, {"place": torch.zeros(1, 2, 25)}, {}, 2)

    made: list[int] = []
    cache, cpu = SeenCache(most=900), torch.device("cpu")
    assert make().bytes == 400
    for key in ("a", "b", "a", "b", "c", "b", "a"):
        cache.get(key, make, cpu)
    assert len(made) - 1 == 4 and list(cache.held) == ["b", "a"]  # a, b, c, and a again


def test_a_file_holds_it_all(host: DiffusersHost, example: Example, tmp_path: Path) -> None:
    condition = condition_of(host, example, key_masks="em")
    (first,) = condition.references
    condition = replace(condition, references=(first, Reference(first.latent * 2, {"rex": None})))
    file = tmp_path / "condition.safetensors"
    condition.save(file)
    assert differences(condition, VisualCondition.load(file)) == []
    with pytest.raises(UserError, match="is a visual condition file of Visual Concepts"):
        ConceptSet.load(file)
    condition.concepts.save(file)
    with pytest.raises(UserError, match="Expected a visual condition file"):
        VisualCondition.load(file)
    replace(condition, blocks={}).save(file)
    with pytest.raises(UserError, match="incomplete"):
        VisualCondition.load(file)


def test_another_family_is_refused(host: DiffusersHost, example: Example) -> None:
    condition = condition_of(host, example)
    other = {n: v for n, v in condition.blocks.items() if "/0/" in n}
    with pytest.raises(UserError, match=r"widths \[128, 64\], got \[128\]"):
        draw(host, replace(condition, blocks=other))
    for wrong in ({"strength": 3.0}, {"span": (0.6, 0.4)}, {"span": (0.0, 1.5)}):
        with pytest.raises(UserError, match="Expected"):
            draw(host, condition, **wrong)


def test_references_of_any_kind(host: DiffusersHost, example: Example) -> None:
    """Another size and aspect; a mask that is given, one that is empty, and a concept that is not there."""
    condition = condition_of(host, example)
    mask = torch.zeros(40, 100, dtype=torch.bool)
    mask[10:30, 20:60] = True
    wide = torch.rand(3, 40, 100, generator=torch.Generator().manual_seed(0))
    given = with_reference(host, condition, wide, {"rex": mask, "doll": ~mask})
    (reference,) = given.references
    assert reference.latent.shape[-1] > reference.latent.shape[-2]
    size = reference.latent.shape[-2], reference.latent.shape[-1]
    share = float(keys_under(mask.float(), (size[0], size[1])).float().mean())
    assert share == pytest.approx(float(mask.float().mean()), abs=0.05)
    assert torch.isfinite(draw(host, given)).all()
    with pytest.raises(UserError, match="mask of rex is empty"):
        with_reference(host, condition, wide, {"rex": mask & False, "doll": mask})
    with pytest.raises(UserError, match="one colour only"):
        with_reference(host, condition, torch.full((3, 64, 64), 0.5))
    found = with_reference(host, condition, example.picture)
    assert set(found.references[0].masks) == {"rex", "doll"}
    nothing = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.5
    with pytest.raises(UserError, match="was not found in the reference"):
        with_reference(host, replace(condition, blocks=condition.blocks), nothing)


def test_vicos_masks_need_none(host: DiffusersHost, example: Example) -> None:
    """Otsu's mask comes from the attention; a concept seen by nobody has no effect."""
    condition = condition_of(host, example, key_masks="otsu")
    again = with_reference(host, condition, example.picture)
    assert list(again.references[0].masks.values()) == [None, None]
    assert not torch.allclose(draw(host, again), draw(host, None, concepts=condition.concepts))
    unseen = VisualUse(condition.blocks, ())
    assert unseen.concepts == () and unseen.acts_at(500.0, 999.0)
