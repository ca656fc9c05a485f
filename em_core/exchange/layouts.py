"""Data sets in the layouts that trainers read: which files there are, and what is in them.

The layouts are those of OneTrainer (23df383, August 2026), kohya's sd-scripts (0.10.1) and musubi-tuner
(30c658c, June 2026), diffusion-pipe (8f83dbf, August 2026) and ComfyUI's data-set nodes (0.33.0), by
their reading code.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ..errors import UserError
from ..examples import Example, NamedMasks, stack_masks
from ..files import Writer, write_folder
from ..pictures import to_image
from ..runs.concept_set import ConceptSet
from .datasets import Choices, TrainingPicture, training_pictures
from .triggers import read_triggers

Files = dict[str, Writer]


def png(image: Image.Image) -> Writer:
    return partial(image.save, format="PNG")


def text(content: str) -> Writer:
    return lambda path: path.write_text(content, encoding="utf-8")


def picture_of(one: TrainingPicture) -> Image.Image:
    return to_image(one.picture)


def mask_of(one: TrainingPicture) -> Image.Image:
    """Black and white in three equal channels: every trainer reads the first."""
    return to_image(one.mask[None].float().expand(3, -1, -1))


def with_alpha(one: TrainingPicture) -> Image.Image:
    """The picture, opaque where it is to be learned; its colours stand everywhere."""
    return to_image(torch.cat([one.picture, one.mask[None].float()]))


def numbered_names(pictures: Sequence[TrainingPicture]) -> list[str]:
    """Return a file name without suffix for each picture: `0001`, or `0001-rex`."""
    return [
        f"{number:04}-{one.subject}" if one.subject else f"{number:04}"
        for number, one in enumerate(pictures, start=1)
    ]


def one_trainer(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """`NAME.png`, `NAME.txt` and `NAME-masklabel.png` side by side."""
    files: Files = {}
    for name, one in zip(numbered_names(pictures), pictures, strict=True):
        files |= {f"{name}.png": png(picture_of(one)), f"{name}.txt": text(one.caption)}
        files[f"{name}-masklabel.png"] = png(mask_of(one))
    return files


def with_masks(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """`images/NAME.png` and `.txt`, and `masks/NAME.png` beside them."""
    files: Files = {}
    for name, one in zip(numbered_names(pictures), pictures, strict=True):
        files |= {
            f"images/{name}.png": png(picture_of(one)),
            f"images/{name}.txt": text(one.caption),
        }
        files[f"masks/{name}.png"] = png(mask_of(one))
    return files


def kohya_masks(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """With a configuration that names the masks as `conditioning_data_dir`; train with `--masked_loss`."""
    subset = {"image_dir": folder / "images", "conditioning_data_dir": folder / "masks"}
    lines = kohya_config(pictures, subset)
    return with_masks(pictures, folder) | {"dataset.toml": text(lines)}


def kohya_alpha(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """`images/NAME.png` with the mask as alpha, for `alpha_mask`."""
    files: Files = {}
    for name, one in zip(numbered_names(pictures), pictures, strict=True):
        files |= {
            f"images/{name}.png": png(with_alpha(one)),
            f"images/{name}.txt": text(one.caption),
        }
    lines = kohya_config(pictures, {"image_dir": folder / "images", "alpha_mask": True})
    return files | {"dataset.toml": text(lines)}


def kohya_config(pictures: Sequence[TrainingPicture], subset: Mapping[str, object]) -> str:
    """Return sd-scripts' configuration of a data set of one subset."""
    general = {"resolution": resolution(pictures), "enable_bucket": True, "batch_size": 1}
    options = {**subset, "caption_extension": ".txt", "num_repeats": 1}
    return f"[[datasets]]\n{toml(general)}\n[[datasets.subsets]]\n{toml(options)}"


def musubi(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """Pictures and captions; this trainer reads no masks for its loss, so those only lie beside."""
    side = resolution(pictures)
    general = {
        "resolution": [side, side],
        "caption_extension": ".txt",
        "batch_size": 1,
        "enable_bucket": True,
    }
    one = {
        "image_directory": folder / "images",
        "cache_directory": folder / "cache",
        "num_repeats": 1,
    }
    lines = f"[general]\n{toml(general)}\n[[datasets]]\n{toml(one)}"
    return with_masks(pictures, folder) | {"dataset.toml": text(lines)}


def diffusion_pipe(pictures: Sequence[TrainingPicture], folder: Path) -> Files:
    """With a configuration that names the masks as `mask_path`."""
    general = {"resolutions": [resolution(pictures)], "enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2.0,
               "num_ar_buckets": 7, "frame_buckets": [1]}  # fmt: skip
    one = {"path": folder / "images", "mask_path": folder / "masks", "num_repeats": 1}
    lines = f"{toml(general)}\n[[directory]]\n{toml(one)}"
    return with_masks(pictures, folder) | {"dataset.toml": text(lines)}


def toml(values: Mapping[str, object]) -> str:
    """Return plain values as lines of TOML; paths with "/", which all systems read."""
    plain = {k: v.as_posix() if isinstance(v, Path) else v for k, v in values.items()}
    # JSON's strings, numbers, lists and truth values are TOML's too.
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in plain.items()
    )


def resolution(pictures: Sequence[TrainingPicture]) -> int:
    """Return the pictures' usual side, in steps of 64 up to 1024, to train at."""
    sides = sorted((one.picture.shape[-1] * one.picture.shape[-2]) ** 0.5 for one in pictures)
    return min(1024, max(64, round(sides[len(sides) // 2] / 64) * 64))


LAYOUTS: Mapping[str, Callable[[Sequence[TrainingPicture], Path], Files]] = {
    "OneTrainer": one_trainer,
    "sd-scripts (masks)": kohya_masks,
    "sd-scripts (alpha)": kohya_alpha,
    "musubi-tuner": musubi,
    "diffusion-pipe": diffusion_pipe,
    "ComfyUI": with_masks,
}
USES = {
    "OneTrainer": "Add the folder as a concept and switch masked training on.",
    "sd-scripts (masks)": "Train with --dataset_config dataset.toml --masked_loss.",
    "sd-scripts (alpha)": "Train with --dataset_config dataset.toml; its alpha_mask says the rest.",
    "musubi-tuner": "Train with --dataset_config dataset.toml. musubi-tuner (of June 2026) has no masked loss, so "
    "the masks are not read: paint the others out, or crop.",
    "diffusion-pipe": "Name dataset.toml as the dataset in its configuration.",
    "ComfyUI": "Load images/ with Load Image-Text (from Folder), masks/ with Load Image (from Folder) and Convert "
    "Image to Mask, and put Mask Training Conditioning before Train LoRA.",
}


def save_dataset(
    examples: Sequence[Example],
    masks: Sequence[NamedMasks],
    choices: Choices,
    layout: str,
    folder: Path,
) -> str:
    """Write a data set into a folder, in full or not at all; what it held before is replaced.

    Returns:
        What is in it and how it is used.

    Raises:
        UserError: see :func:`training_pictures`; there is no such layout, it cannot be written to, or the
            disk is full.
    """
    if layout not in LAYOUTS:
        raise UserError(f"No layout {layout!r}. Expected one of {', '.join(LAYOUTS)}.")
    pictures = training_pictures(examples, masks, choices)
    write_folder(folder, LAYOUTS[layout](pictures, folder.absolute()))
    captions = "; ".join(dict.fromkeys(one.caption for one in pictures))
    return f"{folder}: {len(pictures)} pictures for {layout}. {USES[layout]} Captions: {captions}"


def masks_of_run(concepts: ConceptSet, examples: Sequence[Example]) -> list[NamedMasks]:
    """Return each example's masks as a run found them, at the picture's size.

    Raises:
        UserError: the run had other pictures.
    """
    if len(concepts.masks) != len(examples):
        raise UserError(
            f"The concepts were learned from {len(concepts.masks)} pictures. Expected those of the {len(examples)} "
            "examples that are given. Use the examples that they were learned from."
        )
    found: list[NamedMasks] = []
    for of, example in zip(concepts.masks, examples, strict=True):
        names, size = example.prompt.names, (example.picture.shape[-2], example.picture.shape[-1])
        found.append(dict(zip(names, stack_masks(of, names, size), strict=True)))
    return found


def read_words(text: str, names: Sequence[str]) -> dict[str, str]:
    """Read the triggers for captions, `rex: sks, doll: ohwx doll`; any words will do here.

    Raises:
        UserError: see :func:`read_triggers`.
    """
    return {name: " ".join(words) for name, words in read_triggers(text, names, once=False).items()}
