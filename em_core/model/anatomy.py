"""What the memory of a run depends on: a model's anatomy, how the run spends, and what a step works on."""

from dataclasses import dataclass

from ..settings import WeightKind

# What lies outside the tensors: the CUDA context, workspaces of kernels, parts of the allocator's
# blocks that fit nothing; the last grows with what is allocated.
RESERVE_BYTES = 0.5 * 2**30
RESERVE_SHARE = 0.04


@dataclass(frozen=True)
class Residual:
    """A residual block from `inputs` to `outputs` channels on a latent halved `level` times.

    `skipped`: its group's output is kept for the way up.
    """

    inputs: int
    outputs: int
    level: int
    skipped: bool = False


@dataclass(frozen=True)
class Transformer:
    """`depth` transformer blocks, of attention over the pixels, over the text, and a gated layer."""

    channels: int
    depth: int
    heads: int
    text_width: int
    level: int
    skipped: bool = False


@dataclass(frozen=True)
class Resampling:
    """A convolution that halves or doubles the latent; `level` is that of its larger side."""

    channels: int
    level: int
    skipped: bool = False


Stage = Residual | Transformer | Resampling


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder; `quick`: its activation is x sigmoid(1.702 x), which keeps more."""

    width: int
    layers: int
    bytes: int
    weights: int
    quick: bool = False


@dataclass(frozen=True)
class Autoencoder:
    """A convolutional autoencoder (VAE).

    Attributes:
        bytes: of its weights.
        channels: that its encoder works with at the picture's own size, where it takes the most.
        compute: bytes of a number in its activations.
        factor: pixels of the picture along a side of one cell of the latent.
    """

    bytes: int
    channels: int
    compute: int
    factor: int


@dataclass(frozen=True)
class Anatomy:
    """What the bytes of a run depend on, as a host reads it off its model.

    Attributes:
        stages: of the UNet, in the order in which they run.
        matrices, small: numbers of the UNet's weights with two axes and more, and of the others.
        text: the text encoders.
        lora_width: sum of the inputs and outputs of all layers that a LoRA acts on.
        crossing: number of weights of cross-attention's keys and values.
        autoencoder: the VAE.
    """

    stages: tuple[Stage, ...]
    matrices: int
    small: int
    text: tuple[TextEncoder, ...]
    lora_width: int
    crossing: int
    autoencoder: Autoencoder


@dataclass(frozen=True)
class Spending:
    """How a run spends memory.

    Attributes:
        compute: bytes of a number in the UNet's activations.
        storage: bytes of a number in its matrices while they rest.
        recompute: whether blocks are computed again in the backward pass.
    """

    compute: int = 2
    storage: int = 2
    recompute: bool = False


@dataclass(frozen=True)
class Sight:
    """What a step of the visual phase has besides.

    Attributes:
        concepts: that have blocks.
        tokens: whether the tokens learn too.
        joined: whether the gradient passes through the references' own way.
    """

    concepts: int = 1
    tokens: bool = False
    joined: bool = False


@dataclass(frozen=True)
class Job:
    """What a step works on.

    Attributes:
        height, width: of the latent.
        kind: what is learned besides the tokens' vectors.
        batch: noise samples of a step.
        texts: distinct prompts among them.
        chunks: of 77 pieces in the longest prompt.
        concepts: in the prompt.
        rank: of the LoRA.
        masks: whether the loss looks at attention maps.
        sight: of the visual phase; None where there is none.
    """

    height: int
    width: int
    kind: WeightKind = "none"
    batch: int = 1
    texts: int = 1
    chunks: int = 1
    concepts: int = 2
    rank: int = 4
    masks: bool = True
    sight: Sight | None = None


@dataclass(frozen=True)
class Need:
    """Bytes of a run, by what they are for.

    Attributes:
        weights: of UNet and text encoders.
        trained: parameters, gradients and the optimizer's moments of what is learned besides tokens.
        saved: what a step keeps for its backward pass, text encoders included.
        working: the largest of what comes and goes while that is kept.
        one_pass: of each pass without gradients of those that go through the UNet together.
        regions: of recording how pixels attend to one another, at the start of a run.
        passes: how many passes go through the UNet together.
        gradients: of `trained`, what only comes while `saved` goes.
        ending: where the UNet's backward pass ends, beyond the weights: `trained` as far as it is there,
            what the text encoders still keep, and the block that comes last.
        encoding: of encoding the largest picture, with the VAE's weights. It comes first, when nothing
            else is on the device.
    """

    weights: float
    trained: float
    saved: float
    working: float
    one_pass: float
    regions: float
    passes: int
    gradients: float = 0.0
    ending: float = 0.0
    encoding: float = 0.0

    @property
    def step(self) -> float:
        """Bytes of a step beyond what is there between the steps."""
        return self.saved + self.working

    @property
    def running(self) -> float:
        """The most that tensors take at a time once the pictures are encoded."""
        reading = self.passes * self.one_pass + self.regions
        learning = self.trained - self.gradients + self.step
        return self.weights + max(learning, self.ending, self.trained, reading)

    @property
    def peak(self) -> float:
        """The most that tensors take at a time."""
        return max(self.encoding, self.running)

    @property
    def device(self) -> float:
        """What has to be free on the device: the peak, and what no tensor shows."""
        return self.peak * (1 + RESERVE_SHARE) + RESERVE_BYTES
