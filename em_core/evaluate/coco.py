"""Scenes of COCO (Lin et al. 2014, arXiv 1405.0312) as VCD's evaluation uses them, from the user's folder.

The paper (Rahman et al. 2024, section 4) takes 120 concepts of 11 classes, 20 prompts and 8 pictures for
each; it names neither the classes nor the prompts nor the scenes. Those here are ours.
"""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import UserError
from ..examples import Example
from ..pictures import read_picture
from ..prompts import ConceptPrompt
from .cases import Case, require_data

CONCEPTS, PICTURES_PER_PROMPT, CHOICE_SEED = 120, 8, 2402
CLASSES = (
    "bear", "bicycle", "bird", "cat", "chair", "couch", "dog", "horse", "motorcycle", "teddy bear",
    "umbrella",
)  # fmt: skip
PROMPTS = (
    "a photo of {}", "a photo of {} on a beach", "a photo of {} in the snow", "a photo of {} in a forest",
    "a photo of {} on a city street at night", "a photo of {} in front of a brick wall",
    "a photo of {} on a wooden floor", "a photo of {} in a field of flowers", "a photo of {} under a tree",
    "a photo of {} beside a lake", "a photo of {} in a living room", "a photo of {} on a stage",
    "a photo of {} in the desert", "a photo of {} in the rain", "a photo of {} in a garden",
    "a photo of {} with mountains in the background", "a photo of {} at sunset",
    "an oil painting of {}", "a watercolour of {}", "a pencil drawing of {}",
)  # fmt: skip
LEAST, MOST, RIVAL = 0.03, 0.6, 0.25


@dataclass(frozen=True)
class Scene:
    """A picture with one clear instance of each of several classes.

    Attributes:
        image: COCO's number of the picture.
        file: its file's name.
        size: (height, width) in pixels.
        instances: class -> its polygons, each a list x0, y0, x1, y1, ... in pixels.
    """

    image: int
    file: str
    size: tuple[int, int]
    instances: Mapping[str, Sequence[Sequence[float]]]


def coco_cases(folder: Path, split: str = "val2017", concepts: int = CONCEPTS) -> list[Case]:
    """Return one case per scene, until there are as many concepts as asked for or no scene is left.

    Args:
        folder: COCO's, with `annotations/instances_<split>.json` and the pictures in `<split>/`.
        split: the part of the data.
        concepts: how many concepts, over all scenes.

    Raises:
        UserError: the folder is not laid out as COCO, or has no scene that fits.
    """
    layout = f"COCO's folder, with annotations/instances_{split}.json and its pictures in {split}/"
    file = require_data(folder / "annotations" / f"instances_{split}.json", layout)
    pictures = require_data(folder / split, layout)
    try:
        found = scenes(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not COCO's list of instances ({error!r}).") from error
    chosen = choose(found, concepts)
    if not chosen:
        raise UserError(
            f"No scene in {file} fits. Expected pictures with one clear instance of at least two of these "
            f"classes: {', '.join(CLASSES)}."
        )
    return [case_of(scene, pictures) for scene in chosen]


def scenes(listed: Mapping[str, Any]) -> list[Scene]:
    """Return the pictures that show at least two of the classes clearly, in the order of their numbers."""
    classes = {of["id"]: of["name"] for of in listed["categories"]}
    by_image: dict[int, dict[str, list[Any]]] = {}
    for instance in listed["annotations"]:
        name = classes[instance["category_id"]]
        if name in CLASSES:
            by_image.setdefault(instance["image_id"], {}).setdefault(name, []).append(instance)
    found = []
    for image in sorted(listed["images"], key=lambda of: of["id"]):
        size = (image["height"], image["width"])
        of_class = by_image.get(image["id"], {})
        clear = {name: clear_instance(of_class[name], size) for name in CLASSES if name in of_class}
        instances = {name: polygons for name, polygons in clear.items() if polygons}
        if len(instances) > 1 and Path(image["file_name"]).name == image["file_name"]:
            found.append(Scene(image["id"], image["file_name"], size, instances))
    return found


def clear_instance(
    instances: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> Sequence[Sequence[float]]:
    """Return the polygons of a class's only large instance; none if there is no such, or a crowd.

    It covers 3% to 60% of the picture, and the next largest is at most a quarter of it, so that the
    class's word means this one.
    """
    ordered = sorted(instances, key=lambda of: -of["area"])
    largest = ordered[0]
    share = largest["area"] / (size[0] * size[1])
    rivals = [of for of in ordered[1:] if of["area"] > RIVAL * largest["area"]]
    crowd = any(of.get("iscrowd") for of in ordered)
    if rivals or crowd or not LEAST <= share <= MOST or isinstance(largest["segmentation"], dict):
        return ()
    return [[*map(float, polygon)] for polygon in largest["segmentation"] if len(polygon) >= 6]


def choose(found: Sequence[Scene], concepts: int) -> list[Scene]:
    """Choose scenes by a fixed seed so that no class is much more frequent than the others."""
    left = list(found)
    random.Random(CHOICE_SEED).shuffle(left)  # noqa: S311
    counts: Counter[str] = Counter()
    chosen: list[Scene] = []
    while left and counts.total() < concepts:
        rarest = min(left, key=lambda scene: max(counts[name] for name in scene.instances))
        left.remove(rarest)
        counts.update(rarest.instances.keys())
        chosen.append(rarest)
    return chosen


def case_of(scene: Scene, pictures: Path) -> Case:
    """Return a scene as a case, with a concept for each instance."""
    concepts = {name.replace(" ", "_"): name for name in scene.instances}
    marked = " and ".join(f"<{name}:{words}>" for name, words in concepts.items())
    drawn = " and ".join(f"<{name}>" for name in concepts)
    prompts = tuple(ConceptPrompt.parse(template.format(drawn)) for template in PROMPTS)
    return Case(f"image_{scene.image}", partial(read, scene, pictures, marked), prompts)


def read(scene: Scene, pictures: Path, marked: str) -> list[Example]:
    """Read a scene's picture and masks, which only mode "given" learns from.

    Raises:
        UserError: the picture is not there, or has another size than COCO says.
    """
    picture = read_picture(pictures / scene.file)
    if tuple(picture.shape[-2:]) != scene.size:
        raise UserError(
            f"{pictures / scene.file} has {picture.shape[-1]}x{picture.shape[-2]} pixels. Expected COCO's own "
            f"picture of {scene.size[1]}x{scene.size[0]}."
        )
    masks = {
        name.replace(" ", "_"): filled(polygons, scene.size)
        for name, polygons in scene.instances.items()
    }
    return [Example(picture, ConceptPrompt.parse(f"a photo of {marked}"), masks, masks)]


def filled(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Bool[Tensor, "H W"]:
    """Return the mask that polygons enclose."""
    canvas = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        pen.polygon(list(polygon), fill=1)
    return torch.from_numpy(np.array(canvas, dtype=bool))
