"""The demo world: the same seed gives the same scene, masks are exact, new things stay new."""

import numpy as np
import pytest
from PIL import Image

from em_core.demo import captions, scenes, shapes, textures, vocabulary
from em_core.demo.scenes import (
    concept_scene,
    held_out,
    render,
    training_generator,
    training_scene,
    write_scene,
)


def test_training_scenes_repeat_bit_for_bit():
    first, second = (
        [training_scene(rng) for _ in range(5)]
        for rng in (training_generator(3), training_generator(3))
    )
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.masks, b.masks)
        assert (a.objects, a.background) == (b.objects, b.background)
    other = training_scene(training_generator(4))
    assert not np.array_equal(first[0].image, other.image)


@pytest.mark.parametrize("kind", scenes.SETS)
def test_concept_scenes_repeat_bit_for_bit(kind):
    a, b = concept_scene(11, kind), concept_scene(11, kind)
    assert np.array_equal(a.image, b.image)
    assert all(np.array_equal(a.masks[name], b.masks[name]) for name in a.masks)
    assert (a.prompt, a.objects) == (b.prompt, b.objects)
    assert not np.array_equal(a.image, concept_scene(12, kind).image)


def test_a_known_scene_keeps_its_prompt():
    """A seed's scene must not change between versions: benchmarks refer to it."""
    assert [concept_scene(0, kind).prompt for kind in scenes.SETS] == PROMPTS_OF_SEED_0


def _drawn_alone(scene, ground):
    """Oracle: each object drawn alone, front to back, with plain Python over the alpha masks."""
    hidden = np.zeros((64, 64), dtype=bool)
    visible = []
    for each in reversed(scene.objects):
        alone = render((each,), ground)[1][0]
        visible.append(alone & ~hidden)
        hidden |= alone
    return np.stack(visible[::-1])


def test_masks_are_the_visible_pixels_and_nothing_else_changed():
    rng = training_generator(8)
    for index in range(20):
        scene = training_scene(rng)
        ground = textures.background(scene.background, np.random.default_rng(index))
        picture, masks = render(scene.objects, ground)
        outside = ~masks.any(axis=0)
        assert np.array_equal(picture[outside], textures.to_uint8(ground)[outside])
        assert np.array_equal(masks, _drawn_alone(scene, ground))
        assert np.array_equal(masks, scene.masks)
        assert masks.sum(axis=0).max() == 1
        assert masks.any(axis=(1, 2)).all()


def test_most_of_a_mask_differs_from_the_background():
    rng = training_generator(9)
    for index in range(20):
        scene = training_scene(rng)
        ground = textures.background(scene.background, np.random.default_rng(index))
        picture, masks = render(scene.objects, ground)
        changed = (picture != textures.to_uint8(ground)).any(axis=-1)
        assert all(changed[mask].mean() > 0.9 for mask in masks)


def test_a_square_covers_the_area_that_geometry_says():
    square = scenes.SceneObject(
        "square", "red", "plain", 32.0, 32.0, 15.0, 0.0, 0.0, (0.0, 0.0), (0, 0, 0)
    )
    mask = render((square,), np.zeros((64, 64, 3), dtype=np.float32))[1][0]
    assert mask.sum() == pytest.approx((2 * 0.86 * 15) ** 2, rel=0.06)


def test_held_out_combinations_are_48_and_never_in_training():
    new = scenes.combinations(True)
    assert len(new) == 48 and len(scenes.combinations(False)) == 256 - 48
    for part, words in enumerate((vocabulary.SHAPES, vocabulary.COLOURS)):
        assert all(sum(each[part] == word for each in new) == 6 for word in words)
    rng = training_generator(1)
    seen = [each for _ in range(500) for each in training_scene(rng).objects]
    assert not any(held_out(each.shape, each.colour, each.pattern) for each in seen)
    assert {each.shape for each in seen} == set(vocabulary.SHAPES)


def test_concepts_of_each_set_are_new_in_its_way():
    for seed in range(25):
        a, b, c = (concept_scene(seed, kind).objects for kind in scenes.SETS)
        assert all(held_out(each.shape, each.colour, each.pattern) for each in a)
        for each in b:
            assert each.shape in vocabulary.SHAPES
            assert each.colour not in vocabulary.COLOURS
            assert each.pattern not in vocabulary.PATTERNS
        assert all(each.shape in shapes.NEW and each.shape not in shapes.KNOWN for each in c)
        for first, second in (a, b, c):
            assert first.shape != second.shape and first.colour != second.colour


def test_prompts_name_the_concepts_from_left_to_right():
    for kind in scenes.SETS:
        scene = concept_scene(5, kind)
        words = ["thing"] * 2 if kind == "C" else [each.shape for each in scene.objects]
        expected = f"a photo of <rex:{words[0]}> and <doll:{words[1]}> on {scene.background}"
        assert scene.prompt == expected
        assert list(scene.masks) == ["rex", "doll"]
        assert scene.objects[0].x <= scene.objects[1].x
        for mask, each in zip(scene.masks.values(), scene.objects, strict=True):
            assert mask.any()
            assert np.argwhere(mask).mean(axis=0)[1] == pytest.approx(each.x, abs=7)


def test_bad_sets_and_seeds_are_refused():
    with pytest.raises(ValueError, match="A, B, C, got 'D'"):
        concept_scene(0, "D")
    with pytest.raises(ValueError, match="0 or more, got -1"):
        concept_scene(-1)


def test_written_scene_reads_back(tmp_path):
    scene = concept_scene(2, "B")
    write_scene(scene, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert np.array_equal(np.asarray(Image.open(folder / "image.png")), scene.image)
    for name, mask in scene.masks.items():
        kept = Image.open(folder / f"mask_{name}.png")
        assert kept.mode == "L"
        assert np.array_equal(np.asarray(kept), mask * np.uint8(255))
    assert (folder / "prompt.txt").read_text(encoding="utf-8").strip() == scene.prompt
    assert len(list(folder.iterdir())) == 4


PROMPTS_OF_SEED_0 = [
    "a photo of <rex:circle> and <doll:cross> on grass",
    "a photo of <rex:diamond> and <doll:square> on brick",
    "a photo of <rex:thing> and <doll:thing> on sand",
]
LOOKS = [("star", "red", "striped"), ("circle", "orange", "plain"), ("ring", "blue", "dotted")]


def test_captions_use_known_words_and_point_at_their_nouns():
    rng = np.random.default_rng(0)
    for _ in range(500):
        caption = captions.random_caption(LOOKS, "grass", rng)
        assert set(caption.words) <= set(vocabulary.WORDS)
        for at, which in zip(caption.nouns, caption.meant, strict=True):
            assert caption.words[at] in (LOOKS[which][0], vocabulary.GENERIC)
        if caption.ground is not None:
            assert caption.words[caption.ground] == "grass"


def test_shares_of_caption_forms():
    rng = np.random.default_rng(1)
    made = [captions.random_caption(LOOKS[:2], "sand", rng) for _ in range(3000)]
    said = [each for each in made if each.words]
    nouns = [each.words[at] for each in said for at in each.nouns]
    assert 0.08 < 1 - len(said) / len(made) < 0.12
    assert 0.10 < nouns.count(vocabulary.GENERIC) / len(nouns) < 0.17
    assert 0.15 < np.mean([each.ground is None for each in said]) < 0.25
    alike = [each for each in said if each.words.count("thing") == 2 and "red" not in each.words]
    assert any(each.meant == (0, 1) for each in alike)


def test_objects_that_captions_do_not_tell_apart_are_named_left_to_right():
    rng = np.random.default_rng(2)
    twins = [("star", "red", "plain"), ("star", "red", "plain")]
    made = [captions.random_caption(twins, "sand", rng) for _ in range(400)]
    for each in made:
        phrases = (
            each.text.replace("a photo of ", "").split(" on ")[0].split(" in ")[0].split(" and ")
        )
        if each.words and len(set(phrases)) == 1:
            assert each.meant == (0, 1)


def test_full_and_bare_captions_read_as_written():
    full = captions.full_caption(LOOKS[:2], "grass")
    assert full.text == "a photo of a red striped star and an orange plain circle on grass"
    assert [full.words[at] for at in full.nouns] == ["star", "circle"]
    bare = captions.bare_caption(LOOKS[:2], "grass", generic=True)
    assert bare.text == "a photo of thing and thing on grass"
