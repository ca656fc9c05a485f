"""Embedding files: ours as all programs read them, and those of other programs as vectors."""

import math
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..files import UNREADABLE, read_safetensors, require_finite, tensor_copies, tensor_names
from ..runs.concept_set import ConceptSet
from .pickles import refuse_pickle

WIDTHS = {768: "clip_l", 1024: "clip_h"}
FAMILIES = {("clip_l",): "sd1", ("clip_h",): "sd2", ("clip_l", "clip_g"): "sdxl"}
WIDTH_G = 1280
MOST_VECTORS = 75
"""As many as a text encoder reads at a time."""
FORMAT = "an embedding of SD 1.x, SD 2.x or SDXL"


def embedding_tensors(concepts: ConceptSet, name: str) -> dict[str, Tensor]:
    """Return an embedding file's tensors: `emb_params`, or `clip_l` and `clip_g` for SDXL's two encoders."""
    vectors = {
        encoder: v.detach().float().contiguous() for encoder, v in concepts.vectors[name].items()
    }
    return {"emb_params": next(iter(vectors.values()))} if len(vectors) == 1 else vectors


def read_embedding(path: Path) -> dict[str, Float[Tensor, "n _d"]]:
    """Read the vectors for each text encoder from a safetensors file of any program, in float32.

    kohya, A1111 and this package write `emb_params`, or `clip_l` and `clip_g`; diffusers writes one
    tensor under the token's name. Which encoder vectors are for is told by their width.

    Raises:
        UserError: the file is a pickle, damaged, no embedding, or one of another family.
    """
    refuse_pickle(path)
    shapes = shapes_of(path)
    fitting = [name for name in shapes if name in ("clip_l", "clip_g")] or list(shapes)
    encoders = {encoder_of(name, shapes[name]): name for name in fitting}
    if len(encoders) != len(fitting) or tuple(encoders) not in (*FAMILIES, ("clip_g", "clip_l")):
        raise not_an_embedding(path, describe_shapes(shapes))
    _, tensors = read_safetensors(path, FORMAT, tensor_copies)
    found = {}
    for encoder in sorted(encoders, key=("clip_l", "clip_h", "clip_g").index):
        vectors = tensors[encoders[encoder]]
        if not vectors.is_floating_point():
            raise not_an_embedding(path, f"numbers of type {vectors.dtype}")
        found[encoder] = vectors.float().reshape(-1, vectors.shape[-1])
    require_finite(path, found)
    counts = {encoder: len(vectors) for encoder, vectors in found.items()}
    if len(set(counts.values())) > 1:
        raise not_an_embedding(path, f"different numbers of vectors for its encoders, {counts}")
    return found


def encoder_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the text encoder that a tensor of an embedding file is for; "" for none."""
    if len(shape) not in (1, 2) or math.prod(shape) > MOST_VECTORS * shape[-1]:
        return ""
    if name in ("clip_l", "clip_g"):
        return name
    # The demo model's vectors are narrower than those of any other.
    return WIDTHS.get(shape[-1], "clip_l" if 0 < shape[-1] < min(WIDTHS) else "")


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors, without reading these.

    Raises:
        UserError: the file does not exist or is not safetensors.
    """
    read_safetensors(path, FORMAT, tensor_names)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        raise not_an_embedding(path, f"what cannot be read ({error})") from error


def describe_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first shapes of a file in words."""
    some = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())[:3]]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    return f"{', '.join(some) or 'no tensors'}{more}"


def not_an_embedding(path: Path, got: str) -> UserError:
    return UserError(
        f"{path} is not {FORMAT}. Expected up to {MOST_VECTORS} vectors of width 768 (SD 1.x), of width 1024 "
        f"(SD 2.x), or clip_l of width 768 and clip_g of width {WIDTH_G} (SDXL), got {got}. Choose another file; "
        "a LoRA needs the MODEL and CLIP that it was made for, and its trigger words."
    )


def family_of(vectors: Mapping[str, Tensor]) -> str:
    """Return the family that an embedding's encoders tell."""
    family, widths = FAMILIES[tuple(vectors)], [v.shape[-1] for v in vectors.values()]
    return f"sd-{widths[0]}" if family == "sd1" and widths != [768] else family
