"""DenseCRF (Kraehenbuehl and Koltun 2011) in pure PyTorch, and the refinement of masks with it."""

from .mean_field import DenseCRF
from .refine import MaskRefiner, joint_unary, labels
from .settings import (
    CUTLER,
    DEMO,
    DIFFUMASK,
    LOCAL_COLOUR,
    PRESETS,
    Backend,
    CRFSettings,
)

__all__ = [
    "CUTLER",
    "DEMO",
    "DIFFUMASK",
    "LOCAL_COLOUR",
    "PRESETS",
    "Backend",
    "CRFSettings",
    "DenseCRF",
    "MaskRefiner",
    "joint_unary",
    "labels",
]
