"""A table of rendered training scenes, kept in memory-mapped arrays."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from numpy import ndarray

from .. import vocabulary
from ..scenes import MOST_OBJECTS, SIZE, Scene, training_generator, training_scene

CHUNK = 2000


@dataclass(frozen=True)
class SceneTable:
    """Scenes as arrays.

    `images`: values 0 to 255. `labels`: 0 where the background is seen, k + 1 where object k is.
    `looks`: index of shape, colour and pattern of every object, -1 where there is none.
    `backgrounds`: index of the background.
    """

    images: UInt8[ndarray, "n 64 64 3"]
    labels: UInt8[ndarray, "n 64 64"]
    looks: Int[ndarray, "n 5 3"]
    backgrounds: Int[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)


def _names(count: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "images": ((count, SIZE, SIZE, 3), "uint8"),
        "labels": ((count, SIZE, SIZE), "uint8"),
        "looks": ((count, MOST_OBJECTS, 3), "int8"),
        "backgrounds": ((count,), "int8"),
    }


def open_table(folder: Path) -> SceneTable:
    """Open a table that `render_table` wrote."""
    return SceneTable(
        **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _names(0)}
    )


def render_table(folder: Path, count: int, seed: int, processes: int = 2) -> SceneTable:
    """Render `count` training scenes into `folder`; the same seed gives the same table.

    Scenes come in chunks, each with its own random stream, so the number of processes is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, kind) in _names(count).items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=kind, shape=shape).flush()
    tasks = [
        (folder, start, min(CHUNK, count - start), seed * 1_000_000 + start // CHUNK)
        for start in range(0, count, CHUNK)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_render_chunk, tasks)
    return open_table(folder)


def _render_chunk(folder: Path, start: int, count: int, stream: int) -> None:
    rng = training_generator(stream)
    rows = [as_row(training_scene(rng)) for _ in range(count)]
    for index, name in enumerate(_names(0)):
        array = np.load(folder / f"{name}.npy", mmap_mode="r+")
        array[start : start + count] = np.stack([row[index] for row in rows])
        array.flush()


def as_row(scene: Scene) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Image, labels, looks and background of one scene, as a row of the table."""
    labels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    looks = np.full((MOST_OBJECTS, 3), -1, dtype=np.int8)
    for index, (mask, each) in enumerate(zip(scene.masks, scene.objects, strict=True)):
        labels[mask] = index + 1
        looks[index] = (
            vocabulary.SHAPES.index(each.shape),
            vocabulary.COLOURS.index(each.colour),
            vocabulary.PATTERNS.index(each.pattern),
        )
    background = np.asarray(vocabulary.BACKGROUNDS.index(scene.background), dtype=np.int8)
    return scene.image, labels, looks, background
