"""Settings for how attention maps become masks."""

from dataclasses import dataclass, field

from ..errors import require
from .crf import CRFSettings
from .guards import Guards
from .thresholds import Threshold


@dataclass(frozen=True)
class MaskSettings:
    """Settings for how attention maps become masks (VCD, "Mask extraction").

    Attributes:
        init_timesteps: number of UNet passes of the first estimate (VCD: 50).
        timesteps: range (low, high) of t, in 0..1 of the schedule, from which maps are read. VCD
            reads all; late steps see layout, not edges.
        peak: quantile of a map that counts as its maximum; 1 hangs on a single pixel, which matters in
            fine layers.
        threshold: tau for the normalised map, or "otsu" (ViCo). VCD: fixed, value unstated.
        competition: whether each pixel belongs to one concept only.
        all_layers: whether to average over all layers (VCD) instead of those at or above the loss's
            resolution.
        soft: whether to train under the CRF's marginals instead of its labels.
        crf: settings of the DenseCRF, or None for no refinement.
        guards: checks that a new mask has to pass.
        regions: largest divergence in nats, between the self-attention of two neighbouring parts of
            the picture, at which they are one region; see :mod:`em_core.masks.regions`. None keeps
            concepts apart by their maps alone (VCD).
        share: a region belongs to a concept if its map there has at least this share of its mean in
            the concept's best region.
        rivals: words that are added to the prompt while masks are read, so that what the prompt does
            not name has a word to go to, such as " and a thing". "" adds none (VCD).
        orders: whether maps are read with the prompt's concepts in each of the others' places too, in
            turn. A word's encoding holds what stands before it, and so do its maps. VCD reads the prompt
            as it is.
        naming_passes, naming_times: number of noises, and their range of t, by which the model's error
            tells what each concept's region is, beside the maps, and whether it is seen at all: at
            least 2; 0 leaves it to the maps (VCD).
        presence_passes: number of noises by which the least present concepts are told, where some are
            not found at the start: at least 2; 0 leaves it to the maps (VCD).
        acceptance: how many times what the present mask is worth (its correlation with fresh maps and the
            start's, and what the model's error names there) a new mask must be worth to take its place,
            without robbing one that stays of more than it gains; 0 takes every mask that the guards
            believe (VCD).
    """

    init_timesteps: int = 50
    timesteps: tuple[float, float] = (0.05, 0.4)
    peak: float = 0.995
    threshold: Threshold = 0.4
    competition: bool = True
    all_layers: bool = False
    soft: bool = True
    crf: CRFSettings | None = field(default_factory=CRFSettings)
    guards: Guards = field(default_factory=Guards)
    regions: float | None = 0.08
    share: float = 0.6
    rivals: str = ""
    orders: bool = True
    naming_passes: int = 20
    naming_times: tuple[float, float] = (0.05, 0.95)
    presence_passes: int = 16
    acceptance: float = 1.05

    def __post_init__(self) -> None:
        passes, tau = self.init_timesteps, self.threshold
        require("number of passes", passes, passes >= 1, "at least 1")
        for span in (self.timesteps, self.naming_times):
            fits = len(span) == 2 and 0 <= span[0] < span[1] <= 1
            require("range of timesteps", span, fits, "(low, high) with 0 <= low < high <= 1")
        fits = tau == "otsu" if isinstance(tau, str) else 0 < tau < 1
        require("threshold", tau, fits, "a number between 0 and 1, or 'otsu'")
        limit = self.regions
        require("divergence of regions", limit, limit is None or limit > 0, "more than 0, or None")
        require("peak", self.peak, 0.5 <= self.peak <= 1, "0.5 to 1")
        require("share", self.share, 0 < self.share <= 1, "more than 0 and at most 1")
        for what in ("presence", "naming"):
            passes = getattr(self, f"{what}_passes")
            require(f"passes for {what}", passes, passes == 0 or passes >= 2, "0, or at least 2")
        require("acceptance", self.acceptance, self.acceptance >= 0, "at least 0")
