"""Settings of a run: one frozen dataclass per part.

Where our defaults differ from the papers', the papers' values are given. VCD is Rahman et al. 2024,
arXiv 2402.11487; Break-a-Scene is Avrahami et al. 2023; ViCo is Hao et al. 2023, arXiv 2306.00971;
MuDI is Jang et al. 2024, arXiv 2404.04243.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from .errors import require
from .masks.crf import CRFSettings
from .masks.guards import Guards
from .masks.settings import MaskSettings

Mode = Literal["em", "fixed", "given", "none"]
Normalisation = Literal["mean", "area"]
WeightKind = Literal["none", "lora", "cross_attention", "full"]
KeyMasks = Literal["em", "otsu"]
T = TypeVar("T")


@dataclass(frozen=True)
class EMSettings:
    """Settings of the EM loop (VCD section 3; Break-a-Scene's phase 1 where VCD is silent).

    Attributes:
        mode: where masks come from: "em" estimates them while learning; "fixed" estimates them once
            (VCD's baseline); "given" takes the user's (Break-a-Scene); "none" uses none (textual
            inversion).
        steps: number of M-steps (VCD: "usually 400").
        seed: seed of all random draws in the run.
        learning_rate: AdamW's learning rate for the token vectors (Break-a-Scene: 5e-4 in CLIP's scale).
        decay_after: steps at the full learning rate, after which it falls as the inverse square of the
            step. The vectors then come to rest however many steps there are: all later ones together
            move them no farther than the first ones did. None keeps the rate (Break-a-Scene).
        batch: noise samples per step, all of one picture (Break-a-Scene: 1).
        vectors: token vectors per concept.
        generic_word: what concepts without words start from, a word that fits any thing; "" starts
            them from random vectors (VCD).
        masked_loss: whether the masks weight the diffusion loss (Eq. 3); False is Eq. 1.
        normalisation: how the masked loss is normalised; "mean" is Break-a-Scene's way.
        attention_weight: lambda of Eq. 4. Break-a-Scene's 0.01 goes with "mean"; "area" makes the
            diffusion loss of a mask of a fifth of the picture five times as large.
        end_of_text_weight: weight of ViCo's regulariser (ViCo: 5e-4; 0 is off).
        gradient_clip: largest total norm of the gradient (Break-a-Scene: 1.0).
        union_sampling: whether each sample has a random subset of the picture's concepts
            (Break-a-Scene). Without masks on the loss, every sample has all of them, as its target does.
        flip: whether to mirror picture and masks at random (Break-a-Scene does; wrong for asymmetric
            subjects).
        e_step_every: M-steps between E-steps at the full learning rate (VCD: 1); more where it has fallen.
        refresh: extra UNet passes per E-step; its other statistics come from the M-steps' own passes.
        free_statistics: whether E-steps also count the maps of the M-steps' own passes; False reads only
            those of the refresh.
        image_side: pictures are resized to the area of a square with this side, in pixels; None takes the
            model's own side.
        masks: how attention maps become masks.
    """

    mode: Mode = "em"
    steps: int = 400
    seed: int = 0
    learning_rate: float = 5e-4
    decay_after: int | None = 400
    batch: int = 1
    vectors: int = 1
    generic_word: str = "object"
    masked_loss: bool = True
    normalisation: Normalisation = "area"
    attention_weight: float = 0.05
    end_of_text_weight: float = 0.0
    gradient_clip: float = 1.0
    union_sampling: bool = True
    flip: bool = False
    e_step_every: int = 20
    refresh: int = 8
    free_statistics: bool = True
    image_side: int | None = None
    masks: MaskSettings = field(default_factory=MaskSettings)

    def __post_init__(self) -> None:
        require("mode", self.mode, self.mode in get_args(Mode), f"one of {get_args(Mode)}")
        require("steps", self.steps, self.steps >= 1, "at least 1")
        require("batch", self.batch, self.batch >= 1, "at least 1")
        require("vectors", self.vectors, 1 <= self.vectors <= 32, "1 to 32 per concept")
        require("learning rate", self.learning_rate, is_rate(self.learning_rate), RATE)
        require("e_step_every", self.e_step_every, self.e_step_every >= 1, "at least 1")
        require("decay_after", self.decay_after, is_decay(self.decay_after), DECAY)
        for name in ("refresh", "attention_weight", "end_of_text_weight"):
            value = getattr(self, name)
            require(name, value, value >= 0, "at least 0")
        require("gradient_clip", self.gradient_clip, self.gradient_clip > 0, "more than 0")
        side = self.image_side
        require("side of pictures", side, side is None or side >= 1, "at least 1, or None")

    @property
    def masks_loss(self) -> bool:
        """Whether the diffusion loss is Eq. 3; otherwise it is Eq. 1."""
        return self.masked_loss and self.mode != "none"

    @property
    def has_attention_terms(self) -> bool:
        """Whether the loss looks at attention maps."""
        return self.attention_weight + self.end_of_text_weight > 0

    @property
    def draws_subsets(self) -> bool:
        """Whether the prompts of a batch's samples may name different concepts."""
        return self.union_sampling and self.masks_loss


@dataclass(frozen=True)
class JointSettings:
    """Settings of the joint phase: tokens and weights are learned together, with the masks frozen.

    Source: VCD, "Finally"; Break-a-Scene's phase 2.

    Attributes:
        kind: "lora", "cross_attention" (keys and values), "full", or "none" to skip the phase.
        steps: number of steps of this phase (Break-a-Scene: 400).
        learning_rate: learning rate of the weights; None takes what suits the kind, which is 1e-4 for a
            LoRA (Mix-of-Show) and 2e-6 for whole weights (Break-a-Scene).
        text_learning_rate: that of the text encoders' weights; None takes a tenth of `learning_rate`
            for a LoRA (Mix-of-Show: 1e-5) and `learning_rate` itself for whole weights.
        token_learning_rate: learning rate of the token vectors; None keeps them as the EM loop left them.
        decay_after: steps at the full rates, as in :class:`EMSettings`.
        rank, alpha: rank of the LoRA, and its alpha: the output is scaled by alpha / rank. None takes
            the rank, so that nothing is scaled: Mix-of-Show's rank 4 and alpha 1, since its alpha is
            the whole factor.
        surroundings_weight: weight of a loss that holds the prediction outside the concepts' masks to the one
            that the untouched model makes of the same noise without them, so that learning a subject under its
            mask does not also draw it elsewhere (ours). 0 is off; None is 1 for "full", which measurements
            favour, and 0 for the others, which they do not. It takes one more pass without gradients a step.
        prior_weight: weight of the prior preservation loss; 0 is off (Break-a-Scene: 1).
        prior_prompt: prompt of the prior pictures, which the model draws itself.
        prior_pictures: number of prior pictures (Break-a-Scene: 100).
        seg_mix: share of steps that learn from pictures in which the concepts, cut out by their masks,
            are put together anew (MuDI's Seg-Mix); 0 is off (MuDI: 0.3).
        seg_mix_pictures: number of such pictures made of each picture.
    """

    kind: WeightKind = "none"
    steps: int = 400
    learning_rate: float | None = None
    text_learning_rate: float | None = None
    token_learning_rate: float | None = 5e-5
    decay_after: int | None = 400
    rank: int = 4
    alpha: float | None = None
    surroundings_weight: float | None = None
    prior_weight: float = 0.0
    prior_prompt: str = "a photo"
    prior_pictures: int = 8
    seg_mix: float = 0.0
    seg_mix_pictures: int = 16

    def __post_init__(self) -> None:
        require(
            "joint phase",
            self.kind,
            self.kind in get_args(WeightKind),
            f"one of {get_args(WeightKind)}",
        )
        require("joint steps", self.steps, self.steps >= 1, "at least 1")
        require("rank", self.rank, self.rank >= 1, "at least 1")
        for name in ("learning_rate", "text_learning_rate", "token_learning_rate"):
            rate = getattr(self, name)
            require(f"{name} of the joint phase", rate, rate is None or is_rate(rate), RATE)
        require("alpha", self.alpha, self.alpha is None or self.alpha > 0, "more than 0")
        require("prior_weight", self.prior_weight, self.prior_weight >= 0, "at least 0")
        around = self.surroundings_weight
        require("surroundings_weight", around, around is None or around >= 0, "at least 0, or None")
        require("prior_pictures", self.prior_pictures, self.prior_pictures >= 1, "at least 1")
        require("decay_after", self.decay_after, is_decay(self.decay_after), DECAY)
        require("seg_mix", self.seg_mix, 0 <= self.seg_mix <= 1, "a share, 0 to 1")
        count = self.seg_mix_pictures
        require("seg_mix_pictures", count, count >= 1, "at least 1")

    @property
    def weights_rate(self) -> float:
        """The learning rate of the weights: the given one, or what suits the kind."""
        return self.learning_rate or (1e-4 if self.kind == "lora" else 2e-6)

    @property
    def text_rate(self) -> float:
        """The learning rate of the text encoders' weights: the given one, or what suits the kind."""
        share = 0.1 if self.kind == "lora" else 1.0
        return self.text_learning_rate or share * self.weights_rate

    @property
    def surroundings(self) -> float:
        """The weight of what lies around the masks: the given one, or what suits the kind."""
        default = 1.0 if self.kind == "full" else 0.0
        return default if self.surroundings_weight is None else self.surroundings_weight

    @property
    def lora_alpha(self) -> float:
        """The LoRA's alpha: the given one, or its rank."""
        return float(self.rank) if self.alpha is None else self.alpha


@dataclass(frozen=True)
class VisualSettings:
    """Settings of the visual condition (ViCo, arXiv 2306.00971): image attention that is learned with the
    tokens, after the EM loop or in its place, with the masks frozen.

    ViCo's values are those of its published code; :func:`em_core.presets.vico` has all of them together.

    Attributes:
        steps: number of steps (ViCo: 400 at a batch of 4).
        batch: noise samples per step, all of one picture.
        learning_rate: learning rate of the blocks (ViCo: 1e-5).
        token_learning_rate: that of the token vectors; None keeps them as they are (ViCo: 5e-3 times the
            batch, since its tokens are not learned before).
        token_weight_decay: AdamW's weight decay of the token vectors (ViCo: 0.01, as of the blocks).
        after_em: whether the EM loop comes first; ViCo has none, and starts from the words.
        zero_init: whether the blocks change nothing at first (ViCo: random values, which harm the
            picture during the first steps).
        key_masks: which pixels of the reference may be looked at: those of the EM loop's mask, or of
            Otsu's threshold of the token's attention, layer by layer (ViCo).
        gated: whether a concept's blocks act on the pixels that attend to it (ours, which keeps several
            concepts apart), or on all (ViCo).
        reference_gradient: whether the tokens' gradient passes through the reference's own way through
            the UNet too, which takes twice the memory (ViCo).
        end_of_text_weight: weight of the regulariser that keeps a token's attention near that of the
            end of the text, summed over the places of image attention (ViCo: 5e-4). It has no effect
            on tokens that are kept.
        disturb: whether a reference that is the picture itself is mirrored, moved and scaled, so that
            copying it is no solution (ViCo: no). With further pictures of a concept, another one is the
            reference.
        reference_noise: standard deviation of the noise on a reference that is disturbed, whose values
            are 0..1; 0 adds none.
        own_prompts: whether each half of classifier-free guidance sees the reference under its own prompt
            (ViCo), or both under the conditional one, which takes one pass instead of two.
    """

    steps: int = 400
    batch: int = 1
    learning_rate: float = 1e-4
    token_learning_rate: float | None = None
    token_weight_decay: float = 0.0
    after_em: bool = True
    zero_init: bool = True
    key_masks: KeyMasks = "em"
    gated: bool = True
    reference_gradient: bool = False
    end_of_text_weight: float = 0.0
    disturb: bool = True
    reference_noise: float = 0.0
    own_prompts: bool = False

    def __post_init__(self) -> None:
        require("visual steps", self.steps, self.steps >= 1, "at least 1")
        require("batch", self.batch, self.batch >= 1, "at least 1")
        rate = self.learning_rate
        require("learning rate of image attention", rate, is_rate(rate), RATE)
        rate_or_none = self.token_learning_rate
        fine = rate_or_none is None or is_rate(rate_or_none)
        require("learning rate of the tokens", rate_or_none, fine, f"{RATE}, or None")
        for name in ("token_weight_decay", "end_of_text_weight", "reference_noise"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        kinds = get_args(KeyMasks)
        require("key masks", self.key_masks, self.key_masks in kinds, f"one of {kinds}")


RATE = "a number greater than 0 and at most 1"
DECAY = "at least 1, or None"


def is_rate(value: float) -> bool:
    """Return whether `value` can be a learning rate."""
    return 0 < value <= 1


def is_decay(steps: int | None) -> bool:
    """Return whether a learning rate can fall after so many steps."""
    return steps is None or steps >= 1


def to_json(settings: Any) -> dict[str, Any]:
    """Convert a settings dataclass to plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a settings dataclass from what :func:`to_json` returned.

    Unknown keys are ignored; absent ones keep their defaults.
    """
    nested: dict[str, type] = {"masks": MaskSettings, "crf": CRFSettings, "guards": Guards}
    read: dict[str, Any] = {}
    for setting in fields(kind):  # type: ignore[arg-type]
        if setting.name not in values:
            continue
        value = values[setting.name]
        part = nested.get(setting.name)
        if part is not None and isinstance(value, Mapping):
            value = from_json(part, value)
        read[setting.name] = tuple(value) if isinstance(value, list) else value
    return kind(**read)
