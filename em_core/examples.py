"""Training examples: a picture, its prompt, and masks if the user has any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor

from .errors import UserError
from .masks.resizing import Size, cut, resize
from .pictures import Picture, read_picture
from .prompts import ConceptPrompt, require_no_weights

NamedMasks = Mapping[str, Bool[Tensor, "_ _"]]


@dataclass(frozen=True)
class Example:
    """A picture with its prompt.

    Attributes:
        picture: [3, H, W], RGB in 0..1.
        prompt: the prompt, with at least one concept.
        masks: concept name -> mask of the picture's size, for mode "given".
        truth: concept name -> true mask, used for nothing but the IoU curves.
    """

    picture: Picture
    prompt: ConceptPrompt
    masks: NamedMasks = field(default_factory=dict)
    truth: NamedMasks = field(default_factory=dict)

    @classmethod
    def read(cls, picture: Path | str, prompt: str) -> "Example":
        """Read an example from a picture file (PNG, JPEG, WebP) and a prompt that marks its concepts.

        Raises:
            UserError: the file is not a picture, or no concept is marked as in `<rex:dog>`.
        """
        return cls(read_picture(Path(picture)), ConceptPrompt.parse(prompt))

    def __post_init__(self) -> None:
        self.prompt.require_concepts()
        require_no_weights(str(self.prompt))
        height, width = self.picture.shape[-2:]
        if min(height, width) < 8:
            raise UserError(
                f"The picture is too small. Expected at least 8x8 pixels, got {width}x{height}."
            )
        for what, masks in (("mask", self.masks), ("true mask", self.truth)):
            for name, mask in masks.items():
                if tuple(mask.shape) != (height, width):
                    raise UserError(
                        f"Bad size of the {what} of {name}. Expected the picture's {width}x{height}, "
                        f"got {mask.shape[-1]}x{mask.shape[-2]}. Resize the mask to the picture."
                    )


def fitted_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Return a size of about `side`^2 pixels that keeps the aspect ratio.

    Both sides, height and width, are multiples of `multiple`.
    """
    scale = side / (height * width) ** 0.5
    fit = [max(multiple, round(length * scale / multiple) * multiple) for length in (height, width)]
    return fit[0], fit[1]


def stack_masks(masks: NamedMasks, names: Sequence[str], size: Size) -> Bool[Tensor, "k h w"]:
    """Stack the named masks in this order, resized to `size`.

    Raises:
        UserError: a mask is missing.
    """
    missing = [name for name in names if name not in masks]
    if missing:
        raise UserError(
            f"No mask for {', '.join(missing)}. Give one mask for each of {', '.join(names)}."
        )
    stack = torch.stack([masks[name] for name in names]).float()
    return cut(resize(stack, size, "mask"))
