"""The demo world: the same seed gives the same scene, masks are exact, new things stay new."""

import re

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
from em_core.demo.training.batches import Batches, compact_ids
from em_core.demo.training.data import SceneTable


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
    for first, again in zip(a.pictures, b.pictures, strict=True):
        assert np.array_equal(first.image, again.image)
        assert list(first.masks) == list(again.masks)
        assert all(np.array_equal(first.masks[name], again.masks[name]) for name in first.masks)
        assert (first.prompt, first.objects) == (again.prompt, again.objects)
    other = concept_scene(12, kind)
    assert not np.array_equal(a.pictures[0].image, other.pictures[0].image)


@pytest.mark.parametrize("kind", scenes.SETS)
def test_a_known_scene_keeps_its_prompts(kind):
    """A seed's scene must not change between versions: benchmarks refer to it."""
    assert [picture.prompt for picture in concept_scene(0, kind).pictures] == PROMPTS_OF_SEED_0[
        kind
    ]


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


def test_training_scenes_hold_one_to_five_objects_that_may_overlap():
    rng = training_generator(6)
    made = [training_scene(rng) for _ in range(300)]
    counts = np.bincount([len(each.objects) for each in made], minlength=6)
    assert counts[0] == 0 and len(counts) == 6 and (counts[1:] > 300 / 15).all()
    ground = np.zeros((64, 64, 3), dtype=np.float32)
    several = [each for each in made if len(each.objects) > 1][:60]
    alone = [sum(render((o,), ground)[1].sum() for o in each.objects) for each in several]
    hidden = [all_ > each.masks.sum() for all_, each in zip(alone, several, strict=True)]
    assert 0.2 < np.mean(hidden) < 0.8


def _each(kind, seeds=range(25)):
    return [picture for seed in seeds for picture in concept_scene(seed, kind).pictures]


def _marks(picture):
    """Oracle: name and words of each concept, read off the prompt."""
    return re.findall(r"<([a-z]+):?([a-z]*)>", picture.prompt)


def test_concepts_of_each_set_are_new_in_its_way():
    assert all(held_out(o.shape, o.colour, o.pattern) for p in _each("A") for o in p.objects)
    for each in (o for kind in "BEFGHI" for p in _each(kind) for o in p.objects):
        assert each.shape in vocabulary.SHAPES
        assert each.colour not in vocabulary.COLOURS
        assert each.pattern not in vocabulary.PATTERNS
    for each in (o for kind in "CD" for p in _each(kind) for o in p.objects):
        assert each.shape in shapes.NEW and each.shape not in shapes.KNOWN
        assert each.colour in vocabulary.COLOURS


@pytest.mark.parametrize("kind", "ABCDFGHI")
def test_no_two_objects_of_a_picture_are_alike(kind):
    for picture in _each(kind):
        for part in ("shape", "colour", "pattern"):
            found = [getattr(each, part) for each in picture.objects]
            assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", scenes.SETS)
def test_masks_of_concepts_are_the_visible_pixels_of_what_the_prompt_names(kind):
    ground = np.zeros((64, 64, 3), dtype=np.float32)
    for picture in _each(kind, range(6)):
        seen = _drawn_alone(picture, ground)
        assert [name for name, _ in _marks(picture)] == list(picture.masks) == list(picture.meant)
        for name, words in _marks(picture):
            which = picture.meant[name]
            if which is None:
                assert words == picture.background
                assert np.array_equal(picture.masks[name], ~seen.any(axis=0))
                continue
            assert np.array_equal(picture.masks[name], seen[which])
            if kind not in "CD":
                assert words == picture.objects[which].shape


@pytest.mark.parametrize("kind", "ABFGHI")
def test_order_of_names_says_nothing_where_words_do(kind):
    """The first of the named objects is the leftmost of them about as often as chance says."""
    left, chance = [], []
    for picture in _each(kind, range(60)):
        xs = [picture.objects[i].x for i in picture.meant.values() if i is not None]
        if len(xs) > 1:
            left.append(xs[0] == min(xs))
            chance.append(1 / len(xs))
    assert abs(np.mean(left) - np.mean(chance)) < 3 * (0.25 / len(left)) ** 0.5


def _centre(mask):
    """Oracle: centroid (x, y) of a mask by plain Python."""
    points = [(x, y) for y in range(64) for x in range(64) if mask[y, x]]
    return tuple(sum(p[axis] for p in points) / len(points) for axis in (0, 1))


@pytest.mark.parametrize("kind", scenes.ALIKE)
def test_concepts_that_words_do_not_tell_apart_go_from_left_to_right(kind):
    for picture in _each(kind, range(12)):
        assert len({words for _, words in _marks(picture)}) == 1
        centres = [_centre(mask) for mask in picture.masks.values()]
        assert centres == sorted(centres)


def test_of_two_objects_at_one_x_the_upper_comes_first():
    masks = np.zeros((2, 64, 64), dtype=bool)
    masks[0, 40:50, 20:31] = True
    masks[1, 10:15, 15:36] = True
    assert scenes._left_to_right(
        scenes.Scene(np.zeros((64, 64, 3), np.uint8), masks, (), "sky")
    ) == [
        1,
        0,
    ]


def test_new_shapes_share_one_generic_word_and_set_d_has_none():
    words = set()
    for seed in range(25):
        c, d = concept_scene(seed, "C"), concept_scene(seed, "D")
        words |= {word for _, word in _marks(c.only)}
        assert np.array_equal(c.image, d.image)
        assert all(np.array_equal(c.masks[name], d.masks[name]) for name in c.masks)
        assert d.prompt == f"a photo of <rex> and <doll> on {c.background}"
    assert words == set(vocabulary.GENERICS)


def test_a_bystander_shares_nothing_with_two_of_a_kind_and_is_not_named():
    for picture in _each("J"):
        pair = [picture.objects[i] for i in picture.meant.values()]
        (other,) = (
            each for i, each in enumerate(picture.objects) if i not in picture.meant.values()
        )
        assert pair[0].shape == pair[1].shape
        for part in ("colour", "pattern"):
            assert len({getattr(each, part) for each in (*pair, other)}) == 3
        assert other.shape != pair[0].shape


def test_two_of_a_kind_differ_in_colour_and_pattern_only():
    for picture in _each("E"):
        one, other = picture.objects
        assert one.shape == other.shape
        assert one.colour != other.colour and one.pattern != other.pattern


def test_sets_name_as_many_concepts_as_they_say():
    assert {len(picture.masks) for kind in "ABCDEH" for picture in _each(kind)} == {2}
    assert {(len(p.masks), len(p.objects)) for p in _each("F")} == {(4, 4)}
    counts = {(len(p.masks), len(p.objects)) for p in _each("G", range(40))}
    assert counts == {(1, 3), (1, 4), (2, 3), (2, 4)}
    assert {tuple(sorted(p.masks)) for p in _each("I")} == {("doll", "place", "rex")}


def test_two_pictures_share_one_concept_and_have_a_companion_each():
    for seed in range(10):
        first, second = concept_scene(seed, "H").pictures
        assert set(first.masks) == {"rex", "doll"} and set(second.masks) == {"rex", "kit"}
        companions = [first.objects[first.meant["doll"]], second.objects[second.meant["kit"]]]
        shared = [p.objects[p.meant["rex"]] for p in (first, second)]
        assert len({(o.shape, o.colour, o.pattern) for o in shared}) == 1
        assert (shared[0].x, shared[0].y) != (shared[1].x, shared[1].y)
        assert len({o.shape for o in (*companions, shared[0])}) == 3


def test_touching_objects_touch_and_are_half_visible():
    """Oracle: pixels of the two, each drawn alone, that are at most one step apart."""
    ground = np.zeros((64, 64, 3), dtype=np.float32)
    overlaps = 0
    for picture in _each("I", range(8)):
        alone = [render((each,), ground)[1][0] for each in picture.objects]
        one, other = (np.argwhere(mask) for mask in alone)
        assert np.abs(one[:, None] - other[None]).sum(axis=-1).min() <= 1
        for mask, whole in zip(_drawn_alone(picture, ground), alone, strict=True):
            assert mask.sum() > whole.sum() / 2
        overlaps += (alone[0] & alone[1]).any()
    assert overlaps > 2


def test_a_scene_of_several_pictures_has_no_single_image():
    with pytest.raises(ValueError, match="set H has 2 pictures"):
        _ = concept_scene(0, "H").image


def test_bad_sets_and_seeds_are_refused():
    with pytest.raises(ValueError, match="I, J, got 'K'"):
        concept_scene(0, "K")
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


def test_several_pictures_are_written_into_numbered_folders(tmp_path):
    scene = concept_scene(2, "H")
    write_scene(scene, tmp_path)
    for number, picture in enumerate(scene.pictures, start=1):
        folder = tmp_path / str(number)
        assert np.array_equal(np.asarray(Image.open(folder / "image.png")), picture.image)
        assert (folder / "prompt.txt").read_text(encoding="utf-8").strip() == picture.prompt
        assert {file.name for file in folder.glob("mask_*")} == {
            f"mask_{name}.png" for name in picture.masks
        }


PROMPTS_OF_SEED_0 = {
    "A": ["a photo of <rex:cross> and <doll:circle> on grass"],
    "B": ["a photo of <rex:diamond> and <doll:square> on brick"],
    "C": ["a photo of <rex:item> and <doll:item> on sand"],
    "D": ["a photo of <rex> and <doll> on sand"],
    "E": ["a photo of <rex:diamond> and <doll:diamond> on brick"],
    "F": ["a photo of <rex:cross> and <doll:square> and <kit:ring> and <bob:triangle> on grass"],
    "G": ["a photo of <rex:ring> and <doll:star> on brick"],
    "H": [
        "a photo of <doll:diamond> and <rex:circle> on brick",
        "a photo of <rex:circle> and <kit:ring> on sand",
    ],
    "I": ["a photo of <rex:star> and <doll:ring> on <place:wood>"],
    "J": ["a photo of <rex:heart> and <doll:heart> on grass"],
}
STAR, CIRCLE, RING = LOOKS = [
    ("star", "red", "striped"),
    ("circle", "orange", "plain"),
    ("ring", "blue", "dotted"),
]


def test_captions_use_known_words_and_point_at_their_nouns():
    rng = np.random.default_rng(0)
    for _ in range(500):
        caption = captions.random_caption(LOOKS, "grass", rng)
        assert set(caption.words) <= set(vocabulary.WORDS)
        assert len(set(caption.meant)) == len(caption.meant) == len(caption.clear)
        for at, which in zip(caption.nouns, caption.meant, strict=True):
            assert caption.words[at] in (LOOKS[which][0], *vocabulary.GENERICS)
        if caption.ground is not None:
            assert caption.words[caption.ground] == "grass"


def test_shares_of_caption_forms():
    rng = np.random.default_rng(1)
    made = [captions.random_caption(LOOKS[:2], "sand", rng) for _ in range(3000)]
    said = [each for each in made if each.words]
    nouns = [each.words[at] for each in said for at in each.nouns]
    assert 0.08 < 1 - len(said) / len(made) < 0.12
    for word in vocabulary.GENERICS:
        assert 0.03 < nouns.count(word) / len(nouns) < 0.08
    assert 0.25 < np.mean([each.ground is None for each in said]) < 0.35
    assert 0.28 < np.mean([len(each.nouns) == 1 for each in said]) < 0.38


def test_objects_are_named_in_any_order_whether_words_tell_them_apart_or_not():
    rng = np.random.default_rng(2)
    for looks in ([STAR, STAR], LOOKS[:2]):
        made = [captions.random_caption(looks, "sand", rng).meant for _ in range(600)]
        pairs = [meant for meant in made if len(meant) == 2]
        assert 0.42 < np.mean([meant == (0, 1) for meant in pairs]) < 0.58
        alone = [meant for meant in made if len(meant) == 1]
        assert 0.38 < np.mean([meant == (0,) for meant in alone]) < 0.62


@pytest.mark.parametrize(
    ("looks", "words", "named", "clear"),
    [
        ([STAR, CIRCLE], ["star", "circle"], (0, 1), (True, True)),
        ([STAR, CIRCLE], ["thing", "thing"], (1, 0), (False, False)),
        ([STAR, CIRCLE], ["thing"], (0,), (False,)),
        ([STAR], ["thing"], (0,), (True,)),
        ([STAR, CIRCLE], ["star", "toy"], (0, 1), (True, True)),
        ([STAR, CIRCLE, RING], ["star", "toy"], (0, 2), (True, False)),
        ([STAR, STAR], ["star"], (1,), (False,)),
        ([STAR, ("star", "blue", "plain")], ["red star", "star"], (0, 1), (True, True)),
        ([STAR, ("star", "red", "plain")], ["red star", "plain star"], (0, 1), (True, True)),
        ([STAR, ("star", "red", "plain")], ["red star"], (1,), (False,)),
        # The star may be either, and then the red thing is the other or the ring.
        (
            [STAR, ("star", "red", "plain"), ("ring", "red", "plain")],
            ["star", "red thing"],
            (0, 2),
            (False, False),
        ),
    ],
)
def test_captions_know_whether_their_words_say_which_object_they_mean(looks, words, named, clear):
    assert captions._clear([each.split() for each in words], looks) == clear
    bare = captions.bare_caption(looks, "sky", named=named)
    assert bare.meant == named


def test_full_and_bare_captions_read_as_written():
    full = captions.full_caption(LOOKS[:2], "grass")
    assert full.text == "a photo of a red striped star and an orange plain circle on grass"
    assert [full.words[at] for at in full.nouns] == ["star", "circle"]
    assert full.clear == (True, True)
    bare = captions.bare_caption(LOOKS[:2], "grass", generic="toy")
    assert bare.text == "a photo of toy and toy on grass"
    assert bare.clear == (False, False)
    one = captions.bare_caption(LOOKS, "grass", named=(2,))
    assert (one.text, one.meant, one.clear) == ("a photo of ring on grass", (2,), (True,))


def test_the_teacher_is_silent_where_words_do_not_say_which_object_is_meant():
    """Oracle: targets and weights of three captions, worked out by hand."""
    ids = {word + "</w>": number for number, word in enumerate(vocabulary.WORDS)}
    labels = np.zeros((1, 64, 64), dtype=np.uint8)
    labels[0, :32, :32], labels[0, 32:, 32:] = 1, 2
    looks = np.full((1, 5, 3), -1, dtype=np.int8)
    looks[0, :2] = [(0, 0, 1), (1, 5, 0)]
    table = SceneTable(np.zeros((1, 64, 64, 3), np.uint8), labels, looks, np.zeros(1, np.int8))
    batches = Batches.__new__(Batches)
    batches.table, batches.rows, batches.ground_weight = table, compact_ids(ids), 0.3
    batches.latents = np.zeros((1, 4, 16, 16), np.float16)
    assert batches.looks(0) == [STAR, CIRCLE]
    two = captions.bare_caption([STAR, CIRCLE], "grass", named=(1, 0))
    batch = batches.of(np.array([0]), [two])
    assert batch.weight[0].tolist() == pytest.approx([1, 1, 0, 0, 0, 0.3])
    assert batch.target[0, 0].nonzero().min() == 8 and batch.target[0, 0].sum() == 64
    assert batch.target[0, 1].nonzero().max() == 7 and batch.target[0, 1].sum() == 64
    assert batch.target[0, 5].sum() == 128
    assert batch.select[0].argmax(dim=-1).tolist() == [4, 6, 0, 0, 0, 8]
    for unclear in ({"generic": "toy"}, {"generic": "toy", "named": (0,)}):
        caption = captions.bare_caption([STAR, CIRCLE], "grass", **unclear)
        weight = batches.of(np.array([0]), [caption]).weight[0].tolist()
        assert weight == pytest.approx([0, 0, 0, 0, 0, 0.3])
