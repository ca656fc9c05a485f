"""What a run works on: pictures resized and encoded once, the host, the settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from ..examples import Example, fitted_size, stack_masks
from ..masks.estimate import Refine, make_refiner
from ..masks.resizing import resize_picture
from ..model.protocol import DiffusionModel
from ..prompts import Concept, merge_concepts
from ..runs.key import run_key
from ..settings import EMSettings, JointSettings

Latent = Float[Tensor, "1 c h w"]


@dataclass(frozen=True)
class Prepared:
    """An example as the loop uses it: resized, encoded, with the layers that are read."""

    example: Example
    names: tuple[str, ...]
    size: tuple[int, int]
    Z0: Latent
    Z0_flipped: Latent | None
    refine: Refine | None

    @cached_property
    def latent_size(self) -> tuple[int, int]:
        return self.Z0.shape[-2], self.Z0.shape[-1]

    @cached_property
    def truth(self) -> dict[str, Bool[Tensor, "H W"]]:
        known = [name for name in self.names if name in self.example.truth]
        if not known:
            return {}
        truth = stack_masks(self.example.truth, known, self.size).to(self.Z0.device)
        return dict(zip(known, truth, strict=True))


@dataclass(frozen=True)
class Problem:
    """What a run works on; does not change while it runs."""

    host: DiffusionModel
    pictures: tuple[Prepared, ...]
    concepts: tuple[Concept, ...]
    settings: EMSettings
    joint: JointSettings
    key: str


def prepare(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings,
    joint: JointSettings | None = None,
) -> Problem:
    """Resize and encode the pictures once.

    Raises:
        UserError: no example, or prompts that contradict each other.
    """
    if not examples:
        raise UserError("No example to learn from. Give at least one picture with its prompt.")
    joint = joint or JointSettings()
    pictures = tuple(prepare_picture(host, example, settings) for example in examples)
    concepts = merge_concepts(example.prompt for example in examples)
    key = run_key(host.identity(), examples, settings, joint)
    return Problem(host, pictures, concepts, settings, joint, key)


def prepare_picture(host: DiffusionModel, example: Example, settings: EMSettings) -> Prepared:
    """One example, resized to the model's area and encoded (mirrored too where asked)."""
    height, width = example.picture.shape[-2:]
    side = settings.image_side or host.image_side
    size = fitted_size(height, width, side, host.image_multiple)
    picture = resize_picture(example.picture, size).to(host.device)
    Z0 = encode(host, picture)
    return Prepared(
        example=example,
        names=example.prompt.names,
        size=size,
        Z0=Z0,
        Z0_flipped=encode(host, picture.flip(-1)) if settings.flip else None,
        refine=make_refiner(picture, settings.masks),
    )


@torch.no_grad()
def encode(host: DiffusionModel, picture: Float[Tensor, "3 H W"]) -> Latent:
    """Latent of one picture in 0..1.

    Raises:
        UserError: the autoencoder fails on it, as some do in half precision.
    """
    Z0 = host.encode_image(picture[None] * 2 - 1)
    if not torch.isfinite(Z0).all():
        raise UserError(
            "The autoencoder (VAE) gave values that are not finite for a picture. Run it in float32 "
            "or bfloat16, or use a VAE that was made for half precision."
        )
    return Z0
