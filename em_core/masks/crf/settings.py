"""Parameters of the DenseCRF, and presets: published ones, one that does no harm, one for the demo."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ...errors import require

Backend = Literal["torch", "pydensecrf"]
LENGTHS = ("gaussian_theta_xy", "bilateral_theta_xy", "bilateral_theta_rgb", "reference_side")
WEIGHTS = ("gaussian_weight", "bilateral_weight", "colour_weight", "unary_strength")


@dataclass(frozen=True)
class CRFSettings:
    """Parameters of the kernels, the unary, the colour models and the solver.

    The defaults are those of `LOCAL_COLOUR`.

    Lengths are in pixels of a square picture with sides of `reference_side`. For a picture of h x w
    pixels they are scaled by sqrt(h w) / reference_side, so that a kernel covers the same fraction
    of every picture and stays round on oblong ones.

    Attributes:
        iterations: mean-field updates, in each round if there are colour models; 0 gives the softmax
            of the unary.
        gaussian_theta_xy: standard deviation of the smoothness kernel.
        gaussian_weight: weight of the smoothness kernel; 0 omits it.
        bilateral_theta_xy: spatial standard deviation of the appearance kernel.
        bilateral_theta_rgb: standard deviation of the appearance kernel in colour, on the scale
            0..255 of each channel.
        bilateral_weight: weight of the appearance kernel; 0 omits it.
        colour_weight: weight of the evidence from local colour models in the unary; 0 omits them. They
            take the thetas of the appearance kernel.
        colour_rounds: how often colour models are learned from the present marginals and the CRF is
            solved with them.
        reference_side: side of the square picture that the lengths refer to, in pixels.
        unary_strength: difference in logit between mask and background where a mask is 1. The papers
            take the softmax of the stacked binary masks, which is a strength of 1.
        use_maps: whether the unary follows the maps that masks were made from, where they are given,
            instead of the masks alone.
        working_size: longest side to solve at, in pixels; larger pictures are reduced and the result
            is enlarged again. None solves at full size.
        joint: whether to solve one problem with a label for each mask and one for the background,
            so that masks cannot overlap, or to refine each mask against its own complement.
        backend: "torch", or "pydensecrf" if that package is installed.

    Raises:
        UserError: a value is out of range.
    """

    iterations: int = 5
    gaussian_theta_xy: float = 8.0
    gaussian_weight: float = 3.0
    bilateral_theta_xy: float = 100.0
    bilateral_theta_rgb: float = 8.0
    bilateral_weight: float = 0.0
    colour_weight: float = 1.0
    colour_rounds: int = 3
    reference_side: float = 480.0
    unary_strength: float = 2.5
    use_maps: bool = True
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
        rounds = self.colour_rounds
        whole = isinstance(rounds, int) and 1 <= rounds <= 100
        require("CRF setting colour_rounds", rounds, whole, "a whole number from 1 to 100")
        for name in WEIGHTS:
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


LOCAL_COLOUR = CRFSettings()
"""Local colour models (GrabCut's, made local: see :class:`LocalColour`), for photos and real models.

In the published settings a pixel follows the majority of the pixels that look like it, so that a small
thing on a ground of its colour is swallowed, and good masks get worse. A likelihood does not depend on
how many pixels a label has. The unary is stronger than the papers' because the maps, if given, say
where a mask is unsure. Chosen on photos and demo scenes: benchmarks/results/crf_choice.md.
"""

CUTLER = CRFSettings(
    iterations=10,
    gaussian_theta_xy=3.0,
    gaussian_weight=7.0,
    bilateral_theta_xy=50.0,
    bilateral_theta_rgb=5.0,
    bilateral_weight=10.0,
    colour_weight=0.0,
    unary_strength=1.0,
    use_maps=False,
)
"""The parameters of CutLER's MaskCut, for pictures of 480 x 480."""

DIFFUMASK = replace(
    CUTLER,
    iterations=5,
    gaussian_weight=3.0,
    bilateral_theta_xy=80.0,
    bilateral_theta_rgb=13.0,
    reference_side=512.0,
)
"""The parameters of DiffuMask, for its generated pictures of 512 x 512."""

DEMO = CRFSettings(
    gaussian_theta_xy=2.0,
    bilateral_theta_xy=16.0,
    bilateral_theta_rgb=6.0,
    bilateral_weight=6.0,
    colour_weight=1.5,
    reference_side=64.0,
    unary_strength=1.0,
    use_maps=False,
)
"""For the demo world's pictures of 64 x 64; tuned on scenes that no benchmark uses.

Colour models are added to the appearance kernel here, since flat colours and clean patterns tell more
than a photo's. Maps are left out: they add nothing on fresh scenes, and lose where some things are not
named (benchmarks/results/crf_demo.md).
"""

PRESETS = {
    "local_colour": LOCAL_COLOUR,
    "cutler": CUTLER,
    "diffumask": DIFFUMASK,
    "demo": DEMO,
}
