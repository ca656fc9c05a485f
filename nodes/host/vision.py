"""ComfyUI's CLIP_VISION models, CLIP and DINO among them, as encoders that measure pictures."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.evaluate.encoders import Pictures


class VisionEncoder:
    """The protocol :class:`em_core.evaluate.encoders.ImageEncoder` over a CLIP_VISION."""

    def __init__(self, clip_vision: Any) -> None:
        self.clip_vision = clip_vision

    @torch.no_grad()
    def images(self, pictures: Pictures) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures, as the node CLIP Vision Encode gives them with its crop.

        Raises:
            UserError: the model gives no vector for a whole picture.
        """
        return torch.cat([self.one(picture) for picture in pictures])

    def one(self, picture: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 d"]:
        found = self.clip_vision.encode_image(rearrange(picture, "c h w -> 1 h w c"))[
            "image_embeds"
        ]
        if not isinstance(found, Tensor) or found.ndim != 2:
            raise UserError(
                "This CLIP_VISION gives no single vector for a picture. Expected CLIP's vision model or "
                "DINOv2, from Load CLIP Vision."
            )
        return F.normalize(found.float().cpu(), dim=-1)
