"""Numbers of the DenseCRF, and the sets of them that were published or found."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import UserError

Backend = Literal["torch", "pydensecrf"]
LENGTHS = ("gaussian_theta_xy", "bilateral_theta_xy", "bilateral_theta_rgb", "reference_side")


@dataclass(frozen=True)
class CRFSettings:
    """Kernels, unary and solver. The defaults are CutLER's.

    Lengths are in pixels of a square picture of `reference_side`; for a picture of h x w pixels they
    are scaled by sqrt(h w) / reference_side, so that a kernel covers the same share of every
    picture and stays round on oblong ones.

    Attributes:
        iterations: mean-field updates; 0 gives the softmax of the unary.
        gaussian_theta_xy: standard deviation of the smoothness kernel.
        gaussian_weight: its weight; 0 leaves the kernel out.
        bilateral_theta_xy: spatial standard deviation of the appearance kernel.
        bilateral_theta_rgb: its standard deviation of colour, in 0..255 per channel.
        bilateral_weight: its weight; 0 leaves the kernel out.
        reference_side: side of the picture that the lengths are given for.
        unary_strength: logit between mask and background where a mask is 1 or 0. The papers take
            the softmax of the stacked binary masks: 1.
        working_size: solve with the longer side at most this long, return at full size; None: solve
            at full size.
        joint: one label for each mask and one for the background, so that masks do not overlap;
            False refines each mask alone against its own complement.
        backend: "torch", or "pydensecrf" where that package is installed.

    Raises:
        UserError: a number out of its range.
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
        check("iterations", self.iterations, whole, "a whole number from 0 to 1000")
        for name in LENGTHS:
            value = getattr(self, name)
            fine = is_number(value) and 0 < value < float("inf")
            check(name, value, fine, "a number over 0")
        for name in ("gaussian_weight", "bilateral_weight", "unary_strength"):
            value = getattr(self, name)
            check(name, value, is_number(value) and 0 <= value <= 1000, "a number from 0 to 1000")
        size = self.working_size
        fine = size is None or (isinstance(size, int) and size >= 1)
        check("working_size", size, fine, "a whole number of at least 1, or none for full size")
        check("backend", self.backend, self.backend in get_args(Backend), "'torch' or 'pydensecrf'")

    def scale(self, height: int, width: int) -> float:
        """Pixels of a height x width picture per pixel of the reference."""
        return (height * width) ** 0.5 / self.reference_side


def is_number(value: object) -> bool:
    """Whether it can be compared with numbers."""
    return isinstance(value, int | float)


def check(name: str, value: object, fine: bool, expected: str) -> None:
    """Raise a UserError unless `fine`."""
    if not fine:
        raise UserError(f"Bad CRF setting {name}. Expected {expected}, got {value!r}.")


CUTLER = CRFSettings()
"""CutLER's MaskCut: pictures of 480 x 480."""

DIFFUMASK = CRFSettings(
    iterations=5,
    gaussian_weight=3.0,
    bilateral_theta_xy=80.0,
    bilateral_theta_rgb=13.0,
    reference_side=512.0,
)
"""DiffuMask's, for its generated pictures of 512 x 512."""

DEMO = CRFSettings(
    gaussian_theta_xy=2.0,
    gaussian_weight=2.0,
    bilateral_theta_xy=12.0,
    bilateral_theta_rgb=6.0,
    bilateral_weight=6.0,
    reference_side=64.0,
)
"""For the demo world's pictures of 64 x 64; found on scenes that no benchmark uses."""

PRESETS = {"cutler": CUTLER, "diffumask": DIFFUMASK, "demo": DEMO}
