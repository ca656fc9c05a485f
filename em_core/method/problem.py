"""What a run works on: pictures resized and encoded once, the host, the settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import UserError
from ..examples import Example, fitted_size, stack_masks
from ..masks.estimate import Refine, make_refiner
from ..masks.resizing import Size, resize
from ..masks.settings import MaskSettings
from ..model.layers import AttentionLayer, region_layers
from ..model.protocol import DiffusionModel
from ..prompts import Concept, ConceptVectors, merge_concepts
from ..settings import EMSettings, JointSettings, VisualSettings

LEAST_SPREAD = 1 / 255
"""Range of values in 0..1 that a picture must have in some channel."""
Latent = Float[Tensor, "1 c h w"]


@dataclass(frozen=True)
class Prepared:
    """An example as the method uses it.

    Attributes:
        example: picture, prompt and masks as they were given.
        size: (height, width) in pixels at which the model sees the picture.
        Z0: the picture's latent.
        Z0_flipped: that of the mirrored picture, where mirroring is asked for.
        layers: the model's attention layers at this size that read text.
        self_layers: those in which pixels attend to one another, as far as regions are read from them.
        refine: the picture's DenseCRF, or None where it is off.
    """

    example: Example
    size: Size
    Z0: Latent
    Z0_flipped: Latent | None
    layers: tuple[AttentionLayer, ...]
    self_layers: tuple[AttentionLayer, ...]
    refine: Refine | None

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts in the prompt, in its order."""
        return self.example.prompt.names

    @cached_property
    def truth(self) -> dict[str, Bool[Tensor, "H W"]]:
        """True masks at `size`, of the concepts that have one."""
        known = [name for name in self.names if name in self.example.truth]
        if not known:
            return {}
        truth = stack_masks(self.example.truth, known, self.size).to(self.Z0.device)
        return dict(zip(known, truth, strict=True))


@dataclass(frozen=True)
class Problem:
    """What a run works on; does not change while it runs.

    Attributes:
        host: the model.
        pictures, concepts: of the examples.
        settings, joint: of the EM loop and of the joint phase.
        visual: of the phase that learns a visual condition; None has none.
        known: vectors of concepts that were learned before and are started from.
    """

    host: DiffusionModel
    pictures: tuple[Prepared, ...]
    concepts: tuple[Concept, ...]
    settings: EMSettings
    joint: JointSettings
    visual: VisualSettings | None = None
    known: ConceptVectors = field(default_factory=dict)

    @property
    def has_em(self) -> bool:
        """Whether the run begins with the EM loop: not if all concepts are known, nor where ViCo has none."""
        if self.visual is None:
            return True
        return self.visual.after_em and any(c.name not in self.known for c in self.concepts)

    def looks(self) -> dict[str, str]:
        """Concept -> what it starts from; those that have the same in common are alike."""
        word = self.settings.generic_word
        return {
            c.name: f"<{c.name}>" if c.name in self.known else c.words or word
            for c in self.concepts
        }


def prepare(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings,
    joint: JointSettings | None = None,
    visual: VisualSettings | None = None,
    known: ConceptVectors | None = None,
) -> Problem:
    """Resize and encode the pictures once.

    Raises:
        UserError: no example, prompts that contradict each other, or settings or phases that do.
    """
    joint = joint or JointSettings()
    if visual is not None and joint.kind != "none":
        raise UserError(
            f"A visual condition is not learned in one run with the joint phase {joint.kind!r}. Learn the concepts "
            "with it first, then give them to the visual condition to start from."
        )
    if not examples:
        raise UserError("No example to learn from. Give at least one picture with its prompt.")
    if joint.seg_mix and settings.mode == "none":
        raise UserError(
            "Seg-Mix cuts concepts out by their masks, and mode none has no masks. Expected seg_mix 0, or "
            "another mode."
        )
    concepts = merge_concepts(example.prompt for example in examples)
    if visual is not None and not visual.gated and len(concepts) > 1:
        raise UserError(
            f"Without gates, as ViCo has none, a visual condition is of one concept. Got "
            f"{', '.join(c.name for c in concepts)}. Mark one concept alone in the prompts."
        )
    pictures = tuple(
        prepare_picture(host, example, settings.masks, settings.image_side, settings.flip)
        for example in examples
    )
    return Problem(host, pictures, concepts, settings, joint, visual, known or {})


def prepare_picture(
    host: DiffusionModel,
    example: Example,
    masks: MaskSettings,
    side: int | None = None,
    flip: bool = False,
) -> Prepared:
    """One example, resized to about `side`^2 pixels (None: the model's own) and encoded.

    Raises:
        UserError: the picture has one colour only.
    """
    height, width = example.picture.shape[-2:]
    spread = example.picture.amax(dim=(1, 2)) - example.picture.amin(dim=(1, 2))
    if float(spread.max()) < LEAST_SPREAD:
        raise UserError(
            "The picture has one colour only, so there is nothing to find in it. Check that the right "
            "picture is connected."
        )
    size = fitted_size(height, width, side or host.image_side, host.image_multiple)
    picture = resize(example.picture, size, "picture").to(host.device)
    Z0 = encode(host, picture)
    latent_size = (Z0.shape[-2], Z0.shape[-1])
    return Prepared(
        example=example,
        size=size,
        Z0=Z0,
        Z0_flipped=encode(host, picture.flip(-1)) if flip else None,
        layers=host.attention_layers(latent_size),
        self_layers=region_layers(host.self_attention_layers(latent_size)),
        refine=make_refiner(picture, masks),
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
