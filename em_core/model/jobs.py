"""The largest step of a run, as its examples and settings make it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..examples import Example, fitted_size
from ..settings import EMSettings, JointSettings, VisualSettings
from .anatomy import Anatomy, Job, Sight
from .memory import FAMILIES, KINDS

LETTERS = 300  # about as many as 75 pieces of the vocabulary have


@dataclass(frozen=True)
class Work:
    """What a run is to learn.

    Attributes:
        examples: pictures with their prompts.
        em, joint: settings of the EM loop and of the joint phase.
        visual: settings of the visual phase, if a condition is to be learned.
    """

    examples: Sequence[Example]
    em: EMSettings
    joint: JointSettings
    visual: VisualSettings | None = None

    @property
    def batch(self) -> int:
        """Noise samples of a step that are asked for."""
        return self.em.batch if self.visual is None else self.visual.batch

    def with_batch(self, batch: int) -> "Work":
        """The same with no more noise samples in a step."""
        em = replace(self.em, batch=min(self.em.batch, batch))
        visual = self.visual and replace(self.visual, batch=min(self.visual.batch, batch))
        return replace(self, em=em, visual=visual)

    def describe(self, family: str) -> str:
        """What is learned on which family, for people: `SDXL, LoRA`."""
        learned = KINDS[self.joint.kind] if self.visual is None else "visual condition"
        return f"{FAMILIES.get(family, 'This model')}, {learned}"


def job_of(work: Work, anatomy: Anatomy, image_side: int) -> Job:
    """Return the largest step of a run: that of its largest picture.

    Args:
        work: what is learned.
        anatomy: of the model.
        image_side: pixels along a side of the model's own square pictures.
    """
    em, factor = work.em, anatomy.autoencoder.factor
    side = em.image_side or image_side
    multiple = factor * 2 ** max(stage.level for stage in anatomy.stages)
    pictures = [example.picture for example in work.examples]
    sizes = [fitted_size(p.shape[-2], p.shape[-1], side, multiple) for p in pictures]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    job = Job(
        height=height // factor,
        width=width // factor,
        kind=work.joint.kind,
        batch=em.batch,
        texts=em.batch if em.draws_subsets else 1,
        chunks=1 + max(len(str(example.prompt)) for example in work.examples) // LETTERS,
        concepts=max(len(example.prompt.names) for example in work.examples),
        rank=work.joint.rank,
        masks=em.mode != "none" and em.has_attention_terms,
    )
    return job if work.visual is None else visual_job(job, work.visual, names_in(work.examples))


def visual_job(job: Job, visual: VisualSettings, names: set[str]) -> Job:
    """Return the largest step of a run that learns a visual condition of these concepts."""
    tokens = visual.token_learning_rate is not None
    sight = Sight(len(names), tokens, tokens and visual.reference_gradient)
    return replace(job, batch=visual.batch, texts=min(job.texts, visual.batch), sight=sight)


def names_in(examples: Sequence[Example]) -> set[str]:
    """Return the names of all concepts that the examples mark."""
    return {name for example in examples for name in example.prompt.names}
