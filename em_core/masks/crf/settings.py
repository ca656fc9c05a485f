"""Parameters of the DenseCRF, and presets: published ones and one tuned for the demo."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import require

Backend = Literal["torch", "pydensecrf"]
LENGTHS = ("gaussian_theta_xy", "bilateral_theta_xy", "bilateral_theta_rgb", "reference_side")


@dataclass(frozen=True)
class CRFSettings:
    """Parameters of the kernels, the unary and the solver. The defaults are CutLER's.

    Lengths are in pixels of a square picture with sides of `reference_side`. For a picture of h x w
    pixels they are scaled by sqrt(h w) / reference_side, so that a kernel covers the same fraction
    of every picture and stays round on oblong ones.

    Attributes:
        iterations: mean-field updates; 0 gives the softmax of the unary.
        gaussian_theta_xy: standard deviation of the smoothness kernel.
        gaussian_weight: weight of the smoothness kernel; 0 omits it.
        bilateral_theta_xy: spatial standard deviation of the appearance kernel.
        bilateral_theta_rgb: standard deviation of the appearance kernel in colour, on the scale
            0..255 of each channel.
        bilateral_weight: weight of the appearance kernel; 0 omits it.
        reference_side: side of the square picture that the lengths refer to, in pixels.
        unary_strength: difference in logit between mask and background where a mask is 1. The papers
            take the softmax of the stacked binary masks, which is a strength of 1.
        working_size: longest side to solve at, in pixels; larger pictures are reduced and the result
            is enlarged again. None solves at full size.
        joint: whether to solve one problem with a label for each mask and one for the background,
            so that masks cannot overlap, or to refine each mask against its own complement.
        backend: "torch", or "pydensecrf" if that package is installed.

    Raises:
        UserError: a value is out of range.
    """

    iterations: int = 10
    gaussian_theta_xy: float = 3.0
    gaussian_weight: float = 7.0
    bilateral_theta_xy: float = 50.0
    bilateral_theta_rgb: float = 5.0
    bilateral_weight: float = 10.0
    reference_side: float = 480.0
    unary_strength: float = 1.0
    working_size: int | None = None
    joint: bool = True
    backend: Backend = "torch"

    def __post_init__(self) -> None:
        whole = isinstance(self.iterations, int) and 0 <= self.iterations <= 1000
        require("CRF setting iterations", self.iterations, whole, "a whole number from 0 to 1000")
        for name in LENGTHS:
            value = getattr(self, name)
            fine = is_number(value) and 0 < value < float("inf")
            require(f"CRF setting {name}", value, fine, "a number greater than 0")
        for name in ("gaussian_weight", "bilateral_weight", "unary_strength"):
            value = getattr(self, name)
            fine = is_number(value) and 0 <= value <= 1000
            require(f"CRF setting {name}", value, fine, "a number from 0 to 1000")
        size = self.working_size
        fine = size is None or (isinstance(size, int) and size >= 1)
        expected = "a whole number of at least 1, or none for full size"
        require("CRF setting working_size", size, fine, expected)
        known = self.backend in get_args(Backend)
        require("CRF setting backend", self.backend, known, "'torch' or 'pydensecrf'")

    def scale(self, height: int, width: int) -> float:
        """Pixels of a height x width picture per pixel of the reference picture."""
        return (height * width) ** 0.5 / self.reference_side


def is_number(value: object) -> bool:
    """Whether the value can be compared with numbers."""
    return isinstance(value, int | float)


CUTLER = CRFSettings()
"""The parameters of CutLER's MaskCut, for pictures of 480 x 480."""

DIFFUMASK = CRFSettings(
    iterations=5,
    gaussian_weight=3.0,
    bilateral_theta_xy=80.0,
    bilateral_theta_rgb=13.0,
    reference_side=512.0,
)
"""The parameters of DiffuMask, for its generated pictures of 512 x 512."""

DEMO = CRFSettings(
    gaussian_theta_xy=2.0,
    gaussian_weight=2.0,
    bilateral_theta_xy=12.0,
    bilateral_theta_rgb=6.0,
    bilateral_weight=6.0,
    reference_side=64.0,
)
"""For the demo world's pictures of 64 x 64; tuned on scenes that no benchmark uses."""

PRESETS = {"cutler": CUTLER, "diffumask": DIFFUMASK, "demo": DEMO}
