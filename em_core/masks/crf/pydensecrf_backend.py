"""The same CRF computed by the C++ package pydensecrf, if that is installed."""

from types import ModuleType

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...errors import UserError
from .settings import CRFSettings


def load() -> ModuleType:
    """Import the package's module.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise UserError(
            "The CRF backend 'pydensecrf' is not installed. To build it, a C++ compiler is needed: "
            "pip install pydensecrf2 (the extra 'pydensecrf'). The backend 'torch' gives the same "
            "result without it."
        ) from error
    return densecrf


def infer(
    unary: Float[Tensor, "labels h w"], image: Float[Tensor, "3 h w"], settings: CRFSettings
) -> Float[Tensor, "labels h w"]:
    """Marginals for unary energies on an RGB image in 0..255, computed on the CPU.

    Raises:
        UserError: the package is not installed.
    """
    labels, height, width = unary.shape
    scale = settings.scale(height, width)
    crf = load().DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(rearrange(unary, "l h w -> l (h w)").cpu().contiguous().numpy())
    if settings.gaussian_weight:
        crf.addPairwiseGaussian(settings.gaussian_theta_xy * scale, settings.gaussian_weight)
    if settings.bilateral_weight:
        rgb = rearrange(image, "c h w -> h w c").byte().cpu().contiguous().numpy()
        crf.addPairwiseBilateral(
            settings.bilateral_theta_xy * scale,
            settings.bilateral_theta_rgb,
            rgb,
            settings.bilateral_weight,
        )
    Q = torch.from_numpy(np.array(crf.inference(settings.iterations)))
    return rearrange(Q, "l (h w) -> l h w", h=height).to(unary)
