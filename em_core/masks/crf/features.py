"""Features of pixels, in units of a kernel's standard deviations (float32, as in the authors' code)."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor


def spatial_features(
    height: int, width: int, theta: float, device: torch.device
) -> Float[Tensor, "2 n"]:
    """(x, y) / theta for each pixel of a picture, in row-major order."""
    x = torch.arange(width, dtype=torch.float32, device=device) / float32(theta)
    y = torch.arange(height, dtype=torch.float32, device=device) / float32(theta)
    return torch.stack([repeat(x, "w -> (h w)", h=height), repeat(y, "h -> (h w)", w=width)])


def bilateral_features(
    image: Float[Tensor, "3 h w"], theta_xy: float, theta_rgb: float
) -> Float[Tensor, "5 n"]:
    """(x, y) / theta_xy and (r, g, b) / theta_rgb for each pixel of an image in 0..255."""
    _, height, width = image.shape
    colours = rearrange(image, "c h w -> c (h w)") / float32(theta_rgb)
    return torch.cat([spatial_features(height, width, theta_xy, image.device), colours])


def float32(value: float) -> float:
    """The value rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32))
