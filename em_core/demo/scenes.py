"""Seeded scenes of the demo world: pictures of 64 x 64 pixels, exact masks, captions.

Training scenes and concept scenes draw from disjoint random streams.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from numpy.random import Generator
from PIL import Image

from ..errors import UserError
from . import shapes, textures, vocabulary
from .captions import Look
from .placing import APART, CLOSE, place
from .rendering import SIZE, SceneObject, render

MOST_OBJECTS = 5
SETS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")
# Sets whose words do not tell their concepts apart: masks are right under either assignment.
ALIKE = ("C", "D", "E", "J")
CONCEPT_NAMES = ("rex", "doll", "kit", "bob")
GROUND_NAME = "place"
_TRAINING_STREAM, _CONCEPT_STREAM = 1, 2
# D is C without words, so both draw from one stream.
_STREAMS = {"A": 0, "B": 1, "C": 2, "D": 2, "E": 3, "F": 4, "G": 5, "H": 6, "I": 7, "J": 8}
# Shares of training scenes with one to five objects, and the least and largest radius there.
_COUNTS = (0.2, 0.3, 0.22, 0.16, 0.12)
_TRAINING_RADII = ((10.0, 17.0), (9.5, 15.0), (8.5, 12.5), (8.0, 11.0), (7.5, 9.5))
_PAIR_RADII, _GROUP_RADII, _TOUCHING_RADII = (11.0, 15.0), (8.5, 10.5), (12.0, 16.0)


@dataclass(frozen=True)
class Scene:
    """A picture (values 0 to 255), the objects (later ones in front) and their visible masks."""

    image: UInt8[ndarray, "64 64 3"]
    masks: Bool[ndarray, "n 64 64"]
    objects: tuple[SceneObject, ...]
    background: str


@dataclass(frozen=True)
class ConceptPicture:
    """One picture of a concept scene.

    `masks` maps each concept's name, in the prompt's order, to its visible pixels; `meant` maps it
    to the index of its object, or to None where the concept is the background.
    """

    image: UInt8[ndarray, "64 64 3"]
    masks: dict[str, Bool[ndarray, "64 64"]]
    prompt: str
    background: str
    objects: tuple[SceneObject, ...]
    meant: dict[str, int | None]


Pictures = tuple[ConceptPicture, ...]


@dataclass(frozen=True)
class ConceptScene:
    """New concepts in one picture or several; with one, its parts can be had from the scene."""

    set: str
    seed: int
    pictures: Pictures

    @property
    def only(self) -> ConceptPicture:
        """The picture of a scene that has one; a UserError where there are several."""
        if len(self.pictures) != 1:
            raise UserError(
                f"A scene of set {self.set} has {len(self.pictures)} pictures. Expected a set with "
                "one picture here."
            )
        return self.pictures[0]

    @property
    def image(self) -> UInt8[ndarray, "64 64 3"]:
        """The only picture's pixels."""
        return self.only.image

    @property
    def masks(self) -> dict[str, Bool[ndarray, "64 64"]]:
        """The only picture's visible pixels of each concept."""
        return self.only.masks

    @property
    def prompt(self) -> str:
        """The only picture's prompt."""
        return self.only.prompt

    @property
    def background(self) -> str:
        """The only picture's background."""
        return self.only.background

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The only picture's objects, named or not, later ones in front."""
        return self.only.objects


def held_out(shape: str, colour: str, pattern: str) -> bool:
    """Whether a combination is kept out of training: 48 of the 256, 6 of each shape and colour."""
    s = vocabulary.SHAPES.index(shape)
    c = vocabulary.COLOURS.index(colour)
    p = vocabulary.PATTERNS.index(pattern)
    return (3 * s + c) % 4 != 0 and p == (s + c + s // 4) % 4


@lru_cache(maxsize=2)
def combinations(new: bool) -> tuple[Look, ...]:
    """(shape, colour, pattern) of the combinations in training, or of the new ones."""
    return tuple(
        (shape, colour, pattern)
        for shape in vocabulary.SHAPES
        for colour in vocabulary.COLOURS
        for pattern in vocabulary.PATTERNS
        if held_out(shape, colour, pattern) == new
    )


def training_generator(seed: int) -> Generator:
    """Random numbers for training scenes; no concept scene uses this stream."""
    return np.random.default_rng([_TRAINING_STREAM, seed])


def training_scene(rng: Generator) -> Scene:
    """A scene of 1 to 5 objects of combinations that are not held out.

    In half of the scenes they may touch and overlap; some scenes hold one shape only.
    """
    count = int(rng.choice(MOST_OBJECTS, p=_COUNTS)) + 1
    choices = combinations(False)
    if rng.random() < 0.12:
        shape = str(rng.choice(vocabulary.SHAPES))
        choices = tuple(each for each in choices if each[0] == shape)
    looks = [choices[int(index)] for index in rng.integers(0, len(choices), count)]
    name = str(rng.choice(vocabulary.BACKGROUNDS))
    near = APART if rng.random() < 0.5 else CLOSE
    placed = place(looks, rng, _TRAINING_RADII[count - 1], near)
    objects = tuple(placed[int(index)] for index in rng.permutation(count))
    picture, masks = render(objects, textures.background(name, rng))
    return Scene(picture, masks, objects, name)


def concept_scene(seed: int, set: str = "A") -> ConceptScene:
    """Objects unlike any in training; the same seed and set give the same scene.

    A: two held-out combinations, called by their shape. B: two known shapes in new colours and new
    patterns, called by their shape; so are all sets that say nothing else. C: two new shapes, both
    called by one generic word. D: the scenes of C, without words. E: two of a kind, in different
    colours and patterns. F: four concepts. G: three or four objects, one or two of them named.
    H: two pictures with a concept in common and a companion each. I: two objects that touch or
    overlap, and the background as a concept of its own. J: two of a kind, and a bystander that is not
    named.

    Where the words tell nothing apart (`ALIKE`), the prompt names the concepts from left to right;
    elsewhere in random order. Raises UserError for an unknown set or a negative seed.
    """
    if set not in SETS:
        raise UserError(f"Unknown set of scenes. Expected one of {', '.join(SETS)}, got {set!r}.")
    if seed < 0:
        raise UserError(f"Expected a seed of 0 or more, got {seed}.")
    rng = np.random.default_rng([_CONCEPT_STREAM, _STREAMS[set], seed])
    return ConceptScene(set, seed, _RECIPES[set](rng))


def _held_out_pair(rng: Generator) -> Pictures:
    scene = _draw(_different(combinations(True), 2, rng), rng)
    return (_name(scene, _any_order(2, rng)),)


def _new_pair(rng: Generator) -> Pictures:
    scene = _draw(_different(_new_looks(), 2, rng), rng)
    return (_name(scene, _any_order(2, rng)),)


def _new_shapes(rng: Generator) -> Pictures:
    choices = _product(shapes.NEW, vocabulary.COLOURS, vocabulary.PATTERNS)
    scene = _draw(_different(choices, 2, rng), rng)
    return (_name(scene, _left_to_right(scene), word=str(rng.choice(vocabulary.GENERICS))),)


def _wordless(rng: Generator) -> Pictures:
    (picture,) = _new_shapes(rng)
    marks = " and ".join(f"<{name}>" for name in picture.masks)
    return (replace(picture, prompt=f"a photo of {marks} on {picture.background}"),)


def _two_of_a_kind(rng: Generator) -> Pictures:
    first = _pick(_new_looks(), rng)
    others = [each for each in _new_looks() if _shared(each, first) == (True, False, False)]
    scene = _draw([first, _pick(others, rng)], rng)
    return (_name(scene, _left_to_right(scene)),)


def _two_of_a_kind_and_another(rng: Generator) -> Pictures:
    first, bystander = _different(_new_looks(), 2, rng)
    others = [each for each in _new_looks() if _shared(each, first) == (True, False, False)]
    second = _pick([each for each in others if not any(_shared(each, bystander))], rng)
    scene = _draw([first, second, bystander], rng, _GROUP_RADII)
    pair = [i for i in _left_to_right(scene) if scene.objects[i].shape == first[0]]
    return (_name(scene, pair),)


def _four(rng: Generator) -> Pictures:
    scene = _draw(_different(_new_looks(), 4, rng), rng, _GROUP_RADII)
    return (_name(scene, _any_order(4, rng)),)


def _clutter(rng: Generator) -> Pictures:
    count, named = (int(each) for each in rng.integers((3, 1), (5, 3)))
    scene = _draw(_different(_new_looks(), count, rng), rng, _GROUP_RADII)
    return (_name(scene, _any_order(count, rng)[:named]),)


def _two_pictures(rng: Generator) -> Pictures:
    common, *companions = _different(_new_looks(), 3, rng)
    pictures = []
    for name, companion in zip(CONCEPT_NAMES[1:], companions, strict=False):
        scene = _draw([common, companion], rng)
        order = _any_order(2, rng)
        names = [CONCEPT_NAMES[0] if scene.objects[i].shape == common[0] else name for i in order]
        pictures.append(_name(scene, order, names))
    return tuple(pictures)


def _touching_pair(rng: Generator) -> Pictures:
    looks = _different(_new_looks(), 2, rng)
    nothing = np.zeros((SIZE, SIZE, 3), dtype=np.float32)
    while True:
        scene = _draw(looks, rng, _TOUCHING_RADII, CLOSE)
        alone = np.stack([render((each,), nothing)[1][0] for each in scene.objects])
        seen = scene.masks.sum(axis=(1, 2)) / alone.sum(axis=(1, 2))
        if _touch(*alone) and seen.min() > 0.5:
            break
    return (_name(scene, _any_order(2, rng), ground=True),)


_RECIPES: dict[str, Callable[[Generator], Pictures]] = {
    "A": _held_out_pair,
    "B": _new_pair,
    "C": _new_shapes,
    "D": _wordless,
    "E": _two_of_a_kind,
    "F": _four,
    "G": _clutter,
    "H": _two_pictures,
    "I": _touching_pair,
    "J": _two_of_a_kind_and_another,
}


def _draw(
    looks: Sequence[Look],
    rng: Generator,
    radius: tuple[float, float] = _PAIR_RADII,
    near: float = APART,
) -> Scene:
    name = str(rng.choice(vocabulary.BACKGROUNDS))
    objects = place(looks, rng, radius, near)
    if near < APART:  # any of them may be in front
        objects = tuple(objects[i] for i in _any_order(len(objects), rng))
    picture, masks = render(objects, textures.background(name, rng))
    return Scene(picture, masks, objects, name)


def _name(
    scene: Scene,
    order: Sequence[int],
    names: Sequence[str] = CONCEPT_NAMES,
    word: str = "",
    ground: bool = False,
) -> ConceptPicture:
    """Name the objects of `order`, each by `word` or by its shape, and the `ground` if wanted."""
    named = dict(zip(names, order, strict=False))
    meant: dict[str, int | None] = {**named}
    marks = [f"<{name}:{word or scene.objects[i].shape}>" for name, i in named.items()]
    masks = {name: scene.masks[i] for name, i in named.items()}
    where = scene.background
    if ground:
        meant[GROUND_NAME], where = None, f"<{GROUND_NAME}:{scene.background}>"
        masks[GROUND_NAME] = np.logical_not(scene.masks.any(axis=0))
    prompt = f"a photo of {' and '.join(marks)} on {where}"
    return ConceptPicture(scene.image, masks, prompt, scene.background, scene.objects, meant)


def _any_order(count: int, rng: Generator) -> list[int]:
    return [int(index) for index in rng.permutation(count)]


def _left_to_right(scene: Scene) -> list[int]:
    """Indices of the objects by the centroid of their visible pixels; of two at one x the upper."""
    centroids = [tuple(np.argwhere(mask).mean(axis=0)[::-1]) for mask in scene.masks]
    return sorted(range(len(centroids)), key=centroids.__getitem__)


def _touch(a: Bool[ndarray, "h w"], b: Bool[ndarray, "h w"]) -> bool:
    """Whether two masks share a pixel or have neighbouring ones."""
    grown = np.pad(a, 1)
    near = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:] | a
    return bool((near & b).any())


def _different(choices: Sequence[Look], count: int, rng: Generator) -> list[Look]:
    """Looks of which no two share shape, colour or pattern."""
    chosen: list[Look] = []
    for _ in range(count):
        chosen.append(_pick(choices, rng))
        choices = [each for each in choices if not any(_shared(each, chosen[-1]))]
    return chosen


def _shared(a: Look, b: Look) -> tuple[bool, ...]:
    """Whether shape, colour and pattern are the same."""
    return tuple(one == other for one, other in zip(a, b, strict=True))


def _pick(choices: Sequence[Look], rng: Generator) -> Look:
    return choices[int(rng.integers(len(choices)))]


def _new_looks() -> list[Look]:
    """Known shapes in new colours and new patterns."""
    return _product(vocabulary.SHAPES, textures.NEW_COLOURS, textures.NEW_PATTERNS)


def _product(*words: Iterable[str]) -> list[Look]:
    return [(a, b, c) for a, b, c in itertools.product(*words)]


def write_scene(scene: ConceptScene, folder: Path) -> None:
    """Write `image.png`, `mask_<name>.png` (0 or 255) and `prompt.txt`, each aside and renamed.

    Several pictures go into folders `1`, `2`. Raises OSError when a folder cannot be written.
    """
    if len(scene.pictures) == 1:
        _write_picture(scene.only, folder)
        return
    for number, picture in enumerate(scene.pictures, start=1):
        _write_picture(picture, folder / str(number))


def _write_picture(picture: ConceptPicture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_png(picture.image, folder / "image.png")
    for name, mask in picture.masks.items():
        _write_png(mask.astype(np.uint8) * 255, folder / f"mask_{name}.png")
    vocabulary.write_text(folder / "prompt.txt", picture.prompt + "\n")


def _write_png(pixels: UInt8[ndarray, "..."], path: Path) -> None:
    aside = path.with_name(path.name + ".part")
    Image.fromarray(pixels).save(aside, format="PNG")
    os.replace(aside, path)
