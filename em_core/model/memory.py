"""How many bytes of a device a run takes, computed from a model's anatomy instead of tried.

The numbers are those of a latent diffusion UNet with frozen weights whose attention runs in a fused
kernel: what autograd keeps is then proportional to the pixels. `tests/host/test_memory.py` compares
them with a count of every tensor of the real steps.
"""

from collections.abc import Sequence

from .anatomy import Anatomy, Job, Need, Resampling, Residual, Spending, Stage, Transformer
from .layers import REGION_SIDE

GIB = 2**30
FLOAT = 4
TOKENS = 77
PASSES = 10
# What families and kinds of learning are called where their memory is spoken of.
FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
KINDS = {
    "none": "tokens",
    "lora": "LoRA",
    "cross_attention": "cross-attention",
    "full": "all weights",
}


def needs(anatomy: Anatomy, spending: Spending, job: Job) -> Need:
    """The bytes of a run on a model.

    Where blocks are computed again, no more passes go through the UNet together than take a step's
    memory; otherwise a step takes more than they do.
    """
    saved = saved_bytes(anatomy, spending, job) + text_bytes(anatomy, job)
    working = working_bytes(anatomy, spending, job)
    one_pass, regions = pass_bytes(anatomy, spending, job), region_bytes(anatomy, job)
    fit = int((saved + working - regions) // one_pass)
    return Need(
        weights=weight_bytes(anatomy, spending, job),
        trained=trained_bytes(anatomy, job),
        saved=saved,
        working=working,
        one_pass=one_pass,
        regions=regions,
        passes=max(1, min(PASSES, fit)) if spending.recompute else PASSES,
        gradients=trained_bytes(anatomy, job) / (5 if job.kind == "lora" else 4),
        ending=ending_bytes(anatomy, spending, job),
        encoding=encoding_bytes(anatomy, job),
    )


def encoding_bytes(anatomy: Anatomy, job: Job) -> float:
    """What the VAE takes to encode a picture: in a residual block of the first level, its input, a
    convolution's input and its output."""
    vae = anatomy.autoencoder
    pictures = job.height * job.width * vae.factor**2
    return float(vae.bytes + pictures * 3 * vae.channels * vae.compute)


def weight_bytes(anatomy: Anatomy, spending: Spending, job: Job) -> float:
    """Of UNet and text encoders; these are in the types in which they were loaded, unless they are
    learned themselves."""
    unet = anatomy.matrices * spending.storage + anatomy.small * spending.compute
    full = job.kind == "full"
    return float(unet + sum(FLOAT * e.weights if full else e.bytes for e in anatomy.text))


def trained_bytes(anatomy: Anatomy, job: Job) -> float:
    """Parameter, gradient and two moments in float32. Whole weights are among the weights already,
    but what they were before is kept; an optimizer's step on a LoRA takes as much again for a time."""
    if job.kind == "lora":
        return float(5 * FLOAT * job.rank * anatomy.lora_width)
    text = sum(encoder.weights for encoder in anatomy.text)
    every = anatomy.matrices + anatomy.small + text
    return 4.0 * FLOAT * {"none": 0, "cross_attention": anatomy.crossing, "full": every}[job.kind]


def pixels(job: Job, level: int) -> int:
    """Of all samples, after so many halvings."""
    height, width = job.height, job.width
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return job.batch * height * width


def kept_of(stage: Stage, spending: Spending, job: Job) -> float:
    """Bytes that one block keeps for its backward pass, its input included."""
    n, size = pixels(job, stage.level), spending.compute
    if isinstance(stage, Residual):
        # Inputs of two normalisations and of the activations after them.
        channels = 2 * stage.inputs + 2 * stage.outputs
        if job.kind == "full":
            channels += stage.inputs + stage.outputs
        return float(n * channels * size)
    if isinstance(stage, Resampling):
        return float(n * stage.channels * size) if job.kind == "full" else 0.0
    # Three normalisations' inputs, q, k, v and output of attention to the pixels, q and output of that
    # to the text, and the gated layer's two halves, the activated gate and their product's parts.
    channels = {"none": 21, "cross_attention": 21, "lora": 23, "full": 28}[
        job.kind
    ] * stage.channels
    statistics = 2 * stage.heads * FLOAT + 6 * FLOAT
    text = 2 * stage.channels * TOKENS * job.chunks * job.batch * size
    return float(n * (channels * size + statistics) + text)


def depth_of(stage: Stage) -> int:
    return stage.depth if isinstance(stage, Transformer) else 1


def learning_stages(anatomy: Anatomy, job: Job) -> Sequence[Stage]:
    """The stages that a gradient passes: before the first text is read, none has to."""
    if job.kind == "full":
        return anatomy.stages
    first = next(i for i, stage in enumerate(anatomy.stages) if isinstance(stage, Transformer))
    return anatomy.stages[first:]


def outside(stage: Stage, spending: Spending, job: Job) -> float:
    """Bytes that a stage keeps whether or not its blocks are computed again: the input of a
    transformer's normalisation."""
    if isinstance(stage, Transformer):
        return float(pixels(job, stage.level) * stage.channels * spending.compute)
    return 0.0


def input_of(stage: Stage, spending: Spending, job: Job) -> float:
    """Bytes of the input of one of a stage's blocks."""
    channels = stage.inputs if isinstance(stage, Residual) else stage.channels
    return float(pixels(job, stage.level) * channels * spending.compute)


def saved_bytes(anatomy: Anatomy, spending: Spending, job: Job) -> float:
    """What the UNet keeps for the backward pass of a step."""
    total = 0.0
    for stage in learning_stages(anatomy, job):
        block = input_of if spending.recompute else kept_of
        if not (spending.recompute and isinstance(stage, Resampling)):
            total += depth_of(stage) * block(stage, spending, job)
        total += outside(stage, spending, job)
    if job.masks and not spending.recompute:
        total += sum(recorded_bytes(stage, job) for stage in loss_stages(anatomy, job))
    return total


def loss_stages(anatomy: Anatomy, job: Job) -> list[Transformer]:
    """The transformers whose maps the loss looks at: of the size nearest to 16x16, but not the
    innermost."""
    deepest = max(stage.level for stage in anatomy.stages)
    inner = [i for i, s in enumerate(anatomy.stages) if s.level == deepest]
    middle = inner[len(inner) // 2]
    transformers = [
        s for i, s in enumerate(anatomy.stages) if isinstance(s, Transformer) and i != middle
    ]
    nearest = min(
        (abs((pixels(job, s.level) / job.batch) ** 0.5 - 16) for s in transformers), default=0.0
    )
    return [
        s for s in transformers if abs((pixels(job, s.level) / job.batch) ** 0.5 - 16) == nearest
    ]


def recorded_bytes(stage: Transformer, job: Job) -> float:
    """What recording a stage's maps keeps: queries and softmax in float32."""
    columns = TOKENS * job.chunks * stage.heads
    return float(stage.depth * pixels(job, stage.level) * (stage.channels + columns) * FLOAT)


def working_bytes(anatomy: Anatomy, spending: Spending, job: Job) -> float:
    """What comes and goes in the backward pass: gradients and, where blocks are computed again,
    the largest one."""
    stages = learning_stages(anatomy, job)
    gradients = max(gradient_bytes(stage, spending, job) for stage in stages)
    if not spending.recompute:
        return gradients
    again = 0.0
    looked_at = loss_stages(anatomy, job) if job.masks else []
    for stage in stages:
        block = kept_of(stage, spending, job) + gradient_bytes(stage, spending, job)
        if isinstance(stage, Transformer) and stage in looked_at:
            block += recorded_bytes(stage, job) / stage.depth
        again = max(again, block)
    return again


def ending_bytes(anatomy: Anatomy, spending: Spending, job: Job) -> float:
    """What is there where the UNet's backward pass ends, in its first stage that learns: gradients of
    the text encoders come later, and so does the optimizer's step."""
    trained = trained_bytes(anatomy, job)
    if job.kind == "lora":
        trained *= 4 / 5
    if job.kind == "full":
        trained -= FLOAT * sum(encoder.weights for encoder in anatomy.text)
    last = learning_stages(anatomy, job)[0]
    block = kept_of(last, spending, job) + gradient_bytes(last, spending, job)
    return trained + text_bytes(anatomy, job) + block


def gradient_bytes(stage: Stage, spending: Spending, job: Job) -> float:
    """Gradients that live at a time while a block's backward pass runs."""
    if isinstance(stage, Residual):
        channels = stage.inputs + 2 * stage.outputs
    elif isinstance(stage, Resampling):
        channels = 2 * stage.channels
    else:
        channels = 13 * stage.channels
    return float(pixels(job, stage.level) * channels * spending.compute)


def text_bytes(anatomy: Anatomy, job: Job) -> float:
    """What the text encoders keep, in float32: copies of all that they save, since they add in place."""
    tokens = job.texts * job.chunks * TOKENS
    total = 0.0
    for encoder in anatomy.text:
        widths = 6 + (12 if encoder.quick else 4) + (2 if job.kind == "lora" else 0)
        total += tokens * widths * encoder.width * encoder.layers * FLOAT
    return total


def pass_bytes(anatomy: Anatomy, spending: Spending, job: Job) -> float:
    """Bytes of one sample's pass without gradients: what is kept for the way up, and the largest
    block's own."""
    one = Job(job.height, job.width, chunks=job.chunks)
    kept = sum(
        pixels(one, s.level + isinstance(s, Resampling)) * out_channels(s) * spending.compute
        for s in anatomy.stages
        if s.skipped
    )
    return kept + max(own_bytes(stage, spending, one) for stage in anatomy.stages)


def region_bytes(anatomy: Anatomy, job: Job) -> float:
    """What recording self-attention takes: the maps of all layers of the size that regions are read
    from, and one sample's softmax."""
    cells = {s: pixels(job, s.level) // job.batch for s in anatomy.stages}
    fit = [s for s, n in cells.items() if isinstance(s, Transformer) and n <= REGION_SIDE**2]
    finest = max((cells[s] for s in fit), default=0)
    read = [s for s in anatomy.stages if s in fit and cells[s] == finest]
    depth, heads = sum(depth_of(s) for s in read), max((s.heads for s in fit), default=0)
    return float((depth + heads) * FLOAT * finest**2)


def out_channels(stage: Stage) -> int:
    return stage.outputs if isinstance(stage, Residual) else stage.channels


def own_bytes(stage: Stage, spending: Spending, job: Job) -> float:
    """What a block holds at a time in a pass without gradients, its maps' softmax included."""
    n, size = pixels(job, stage.level), spending.compute
    if isinstance(stage, Residual):
        return float(n * (3 * stage.inputs + 2 * stage.outputs) * size)
    if isinstance(stage, Resampling):
        return float(n * 2 * stage.channels * size)
    gated = 20 * stage.channels * size
    recorded = 2 * TOKENS * job.chunks * stage.heads * FLOAT + 2 * stage.channels * FLOAT
    return float(n * max(gated, 4 * stage.channels * size + recorded))


def describe(what: str, need: float, free: float) -> str:
    """What a run needs and what there is, for people: `SDXL, LoRA: 9.8 GB of 11.2 GB free`."""
    return f"{what}: {need / GIB:.1f} GB of {free / GIB:.1f} GB free"
