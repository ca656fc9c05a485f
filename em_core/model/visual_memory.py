"""Bytes of a run that learns a visual condition: those of the EM loop before it, or of its own phase."""

from collections.abc import Sequence
from dataclasses import replace

from .anatomy import Anatomy, Job, Need, Sight, Spending, Stage, Transformer
from .image_attention import shapes
from .memory import FLOAT, TOKENS, kept_of, needs, pixels


def needs_of(anatomy: Anatomy, spending: Spending, job: Job) -> Need:
    """The bytes of a run on a model, whatever it learns."""
    before = needs(anatomy, spending, job)
    if job.sight is None:
        return before
    return visual_needs(anatomy, spending, job, job.sight, before)


def visual_needs(
    anatomy: Anatomy, spending: Spending, job: Job, sight: Sight, before: Need
) -> Need:
    """The bytes of the visual phase, or of the EM loop before it where they are more.

    Kept tokens let the gradient end at the first block. References without a gradient leave nothing but
    their features at the blocks' places.
    """
    first, places = image_stages(anatomy)
    later = replace(anatomy, stages=anatomy.stages[first:])
    masks = job.masks and sight.tokens
    samples = replace(job, batch=job.batch * (1 + sight.joined), masks=masks)
    learning = needs(anatomy if sight.tokens else with_text(later), spending, samples)
    count = sight.concepts * sum(numbers_of(place.channels) for place in places)
    blocks = sum(sight.concepts * block_bytes(place, spending, job) for place in places)
    features = sum(pixels(job, p.level) * p.channels * spending.compute for p in places)
    casts = count * spending.compute if spending.compute < FLOAT else 0.0
    saved = learning.saved + blocks + features + casts
    trained = 4.0 * FLOAT * count
    phase = replace(
        before,
        trained=trained,
        saved=saved,
        working=learning.working,
        gradients=trained / 4,
        ending=trained + learning.ending,
    )
    return max(before, phase, key=lambda need: need.running)


def image_stages(anatomy: Anatomy) -> tuple[int, Sequence[Transformer]]:
    """The index of the first stage that image attention stands behind, and all of them: every second
    transformer of the way up, from the second on."""
    up = [
        (i, stage)
        for i, stage in enumerate(anatomy.stages)
        if isinstance(stage, Transformer) and not stage.skipped
    ][1:][1::2]
    return up[0][0], [stage for _, stage in up]


def with_text(anatomy: Anatomy) -> Anatomy:
    """Stages that a gradient passes though no text is read before: it begins behind the first one."""
    first = anatomy.stages[0]
    assert isinstance(first, Transformer)  # noqa: S101
    start: Stage = replace(first, depth=0)
    return replace(anatomy, stages=(start, *anatomy.stages[1:]), text=())


def numbers_of(channels: int) -> int:
    """Parameters of a block."""
    total = 0
    for shape in shapes(channels).values():
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total


def block_bytes(place: Transformer, spending: Spending, job: Job) -> float:
    """What a block keeps: as a text block whose weights learn, but with the reference's keys and values."""
    one = replace(place, depth=1)
    text = 2 * place.channels * TOKENS * job.chunks * job.batch * spending.compute
    keys = 2 * pixels(job, place.level) * place.channels * spending.compute
    return kept_of(one, spending, replace(job, kind="full")) - text + keys
