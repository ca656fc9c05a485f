"""Seeded scenes of the demo world: pictures of 64 x 64 pixels, exact masks, captions.

Training scenes and concept scenes draw from disjoint random streams. A scene is rendered at three
times its size and averaged down; an object's mask holds the visible pixels that it covers by more
than half, and no other pixel of the background is touched.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from math import radians
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageDraw

from ..errors import UserError
from . import shapes, textures, vocabulary

SIZE = textures.SIZE
_FINE = 3
SETS = ("A", "B", "C")
CONCEPT_NAMES = ("rex", "doll")
_TRAINING_STREAM, _CONCEPT_STREAM = 1, 2


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and where; lengths in pixels, `angle` in radians."""

    shape: str
    colour: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    pattern_angle: float
    phase: tuple[float, float]
    tint: tuple[int, int, int]


@dataclass(frozen=True)
class TrainingScene:
    """A picture (values 0 to 255), the objects from left to right and their visible masks."""

    image: UInt8[ndarray, "64 64 3"]
    masks: Bool[ndarray, "n 64 64"]
    objects: tuple[SceneObject, ...]
    background: str


@dataclass(frozen=True)
class ConceptScene:
    """Two new concepts in one picture; `masks` maps each concept's name to its visible pixels."""

    image: UInt8[ndarray, "64 64 3"]
    masks: dict[str, Bool[ndarray, "64 64"]]
    prompt: str
    background: str
    set: str
    seed: int
    objects: tuple[SceneObject, ...]


def held_out(shape: str, colour: str, pattern: str) -> bool:
    """Whether a combination is kept out of training: 48 of the 256, 6 of each shape and colour."""
    s = vocabulary.SHAPES.index(shape)
    c = vocabulary.COLOURS.index(colour)
    p = vocabulary.PATTERNS.index(pattern)
    return (3 * s + c) % 4 != 0 and p == (s + c + s // 4) % 4


@lru_cache(maxsize=2)
def combinations(new: bool) -> tuple[tuple[str, str, str], ...]:
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


def training_scene(rng: Generator) -> TrainingScene:
    """A scene of 1 to 3 objects of combinations that are not held out."""
    count = int(rng.choice(3, p=(0.35, 0.5, 0.15))) + 1
    choices = combinations(False)
    looks = [choices[int(index)] for index in rng.integers(0, len(choices), count)]
    name = str(rng.choice(vocabulary.BACKGROUNDS))
    objects = _place(looks, rng)
    picture, masks = render(objects, textures.background(name, rng))
    return TrainingScene(picture, masks, objects, name)


def concept_scene(seed: int, set: str = "A") -> ConceptScene:
    """Two objects unlike any in training; the same seed and set give the same scene.

    Set A: held-out combinations, called by their shape. Set B: known shapes in new colours and new
    patterns, called by their shape. Set C: new shapes in known colours, called "thing". The prompt
    names the concepts from left to right. Raises UserError for an unknown set or a negative seed.
    """
    if set not in SETS:
        raise UserError(f"Unknown set of scenes. Expected one of {', '.join(SETS)}, got {set!r}.")
    if seed < 0:
        raise UserError(f"Expected a seed of 0 or more, got {seed}.")
    rng = np.random.default_rng([_CONCEPT_STREAM, SETS.index(set), seed])
    looks = _new_looks(set, rng)
    name = str(rng.choice(vocabulary.BACKGROUNDS))
    objects = _place(looks, rng)
    picture, masks = render(objects, textures.background(name, rng))
    words = [vocabulary.GENERIC if set == "C" else each.shape for each in objects]
    named = [f"<{n}:{w}>" for n, w in zip(CONCEPT_NAMES, words, strict=True)]
    prompt = f"a photo of {named[0]} and {named[1]} on {name}"
    truth = dict(zip(CONCEPT_NAMES, masks, strict=True))
    return ConceptScene(picture, truth, prompt, name, set, seed, objects)


def _new_looks(set: str, rng: Generator) -> list[tuple[str, str, str]]:
    """Two looks of the set that differ in shape, colour and pattern."""
    if set == "A":
        choices = list(combinations(True))
    elif set == "B":
        choices = _product(vocabulary.SHAPES, textures.NEW_COLOURS, textures.NEW_PATTERNS)
    else:
        choices = _product(shapes.NEW, vocabulary.COLOURS, vocabulary.PATTERNS)
    first = choices[int(rng.integers(len(choices)))]
    others = [each for each in choices if all(a != b for a, b in zip(each, first, strict=True))]
    return [first, others[int(rng.integers(len(others)))]]


def _product(*words: object) -> list[tuple[str, str, str]]:
    first, second, third = (tuple(each) for each in words)  # type: ignore[arg-type, var-annotated]
    return [(a, b, c) for a in first for b in second for c in third]


_RADII = {1: (12.0, 17.0), 2: (11.0, 15.0), 3: (9.5, 11.5)}


def _place(looks: list[tuple[str, str, str]], rng: Generator) -> tuple[SceneObject, ...]:
    """Put objects where they hardly overlap; left to right."""
    low, high = _RADII[len(looks)]
    while True:
        radii = rng.uniform(low, high, len(looks))
        margin = radii[:, None] * 0.95
        centres = margin + rng.random((len(looks), 2)) * (SIZE - 2 * margin)
        far = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        near = far < 0.93 * (radii[:, None] + radii[None])
        if not near[~np.eye(len(looks), dtype=bool)].any():
            break
    order = np.argsort(centres[:, 0])
    return tuple(_object(looks[i], centres[i], float(radii[i]), rng) for i in order)


def _object(
    look: tuple[str, str, str], centre: Float[ndarray, "2"], radius: float, rng: Generator
) -> SceneObject:
    red, green, blue = (int(value) for value in rng.integers(-9, 10, 3))
    across, down = (float(value) for value in rng.uniform(0, 14, 2))
    turn, lay = (float(value) for value in rng.uniform(-1, 1, 2))
    return SceneObject(
        *look,
        x=float(centre[0]),
        y=float(centre[1]),
        radius=radius,
        angle=radians(12) * turn,
        pattern_angle=radians(90) * lay,
        phase=(across, down),
        tint=(red, green, blue),
    )


def render(
    objects: tuple[SceneObject, ...], ground: Float[ndarray, "64 64 3"]
) -> tuple[UInt8[ndarray, "64 64 3"], Bool[ndarray, "n 64 64"]]:
    """Draw objects, later ones in front, on a background of values 0 to 255."""
    picture = ground.copy()
    masks = np.zeros((len(objects), SIZE, SIZE), dtype=bool)
    for index, each in enumerate(objects):
        window, colour, cover = _paint(each)
        alpha = np.clip(2 * cover - 1, 0, 1)[..., None]
        picture[window] += alpha * (colour - picture[window])
        masks[(slice(None), *window)] &= cover <= 0.5
        masks[(index, *window)] = cover > 0.5
    return textures.to_uint8(picture), masks


def _paint(
    each: SceneObject,
) -> tuple[tuple[slice, slice], Float[ndarray, "h w 3"], Float[ndarray, "h w"]]:
    """Window of the canvas, colour there (0 to 255), and how much of each pixel is covered."""
    reach = 1.25 * each.radius + 1
    left, top = max(0, int(each.x - reach)), max(0, int(each.y - reach))
    right, bottom = min(SIZE, int(each.x + reach) + 1), min(SIZE, int(each.y + reach) + 1)
    inside, edge = _stencil(each, left, top, right - left, bottom - top)
    x = (np.arange(inside.shape[1], dtype=np.float32) + 0.5) / _FINE + (left - each.x)
    y = (np.arange(inside.shape[0], dtype=np.float32) + 0.5) / _FINE + (top - each.y)
    colours = textures.COLOURS | textures.NEW_COLOURS
    main = np.asarray(colours[each.colour], dtype=np.float32) + np.asarray(each.tint)
    second = np.asarray(textures.marking(each.colour), dtype=np.float32)
    marked = textures.pattern_mask(each.pattern, *np.meshgrid(x, y), each.pattern_angle, each.phase)
    share = _shrink(inside & ~edge & marked) if marked is not None else np.zeros(1)
    line = _shrink(edge)
    cover = _shrink(inside)
    total = np.maximum(cover, 1e-6)
    outline = _outline_colour(main)
    colour = main + (share / total)[..., None] * (second - main)
    colour = colour + (line / total)[..., None] * (outline - main)
    return (slice(top, bottom), slice(left, right)), colour.astype(np.float32), cover


def _outline_colour(main: Float[ndarray, "3"]) -> Float[ndarray, "3"]:
    return main * 0.6


def _stencil(
    each: SceneObject, left: int, top: int, width: int, height: int
) -> tuple[Bool[ndarray, "h w"], Bool[ndarray, "h w"]]:
    """Inside of the shape and the part of it that is its outline, on the fine grid."""
    size = (width * _FINE, height * _FINE)
    centre = ((each.x - left) * _FINE - 0.5, (each.y - top) * _FINE - 0.5)
    fill, line = Image.new("1", size), Image.new("1", size)
    brush, pen = ImageDraw.Draw(fill), ImageDraw.Draw(line)
    added, cut = shapes.OUTLINES[each.shape]
    for polygons, value in ((added, 1), (cut, 0)):
        for polygon in polygons:
            points = shapes.placed(polygon, each.radius * _FINE, each.angle, centre)
            brush.polygon(points, fill=value)
            if len(added) == 1 or value == 0:
                pen.line([*points, *points[:2]], fill=1, width=5)
    inside = np.asarray(fill)
    return inside, np.asarray(line) & inside


def _shrink(fine: Bool[ndarray, "fh fw"]) -> Float[ndarray, "h w"]:
    height, width = fine.shape[0] // _FINE, fine.shape[1] // _FINE
    blocks = fine.reshape(height, _FINE, width, _FINE)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def write_scene(scene: ConceptScene, folder: Path) -> None:
    """Write `image.png`, `mask_<name>.png` (0 or 255) and `prompt.txt`, each aside and renamed.

    Raises OSError when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_png(scene.image, folder / "image.png")
    for name, mask in scene.masks.items():
        _write_png(mask.astype(np.uint8) * 255, folder / f"mask_{name}.png")
    vocabulary.write_text(folder / "prompt.txt", scene.prompt + "\n")


def _write_png(pixels: UInt8[ndarray, "..."], path: Path) -> None:
    aside = path.with_name(path.name + ".part")
    Image.fromarray(pixels).save(aside, format="PNG")
    os.replace(aside, path)
