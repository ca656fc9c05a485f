"""What is evaluated: learned concepts, prompts and seeds, what to measure with, what to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..prompts import Concept, ConceptPrompt, embedding_name, require_no_weights
from ..runs.concept_set import ConceptSet
from .encoders import Instruments
from .measures import Vectors
from .references import References

THING = "object"  # stands for a concept that was learned without words


@dataclass(frozen=True)
class Task:
    """What is evaluated, and with what.

    Attributes:
        concepts: the learned concepts.
        prompts: each marks one of them or more, as `<name>`.
        seeds: seeds of each prompt's pictures.
        instruments: encoders.
        references: what the concepts ought to look like; without them, neither identity nor mixing is
            measured.
    """

    concepts: ConceptSet
    prompts: tuple[ConceptPrompt, ...]
    seeds: tuple[int, ...]
    instruments: Instruments
    references: References = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_prompts(self.prompts, self.concepts)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError("Bad seeds. Expected at least one, and none twice.")

    @property
    def compared(self) -> tuple[str, ...]:
        """The concepts that have references, in the concepts' order."""
        return tuple(name for name in self.concepts.names if name in self.references)

    @cached_property
    def looks(self) -> dict[str, dict[str, Vectors]]:
        """Measure of identity -> concept -> unit vectors of its references."""
        return {
            look: {name: encoder.images(self.references[name]) for name in self.compared}
            for look, encoder in self.instruments.looks.items()
        }

    @cached_property
    def texts(self) -> Float[Tensor, "n d"] | None:
        """Unit vectors of the prompts in words, if their agreement is measured."""
        if self.instruments.clip is None:
            return None
        return self.instruments.clip.texts([in_words(p, self.concepts) for p in self.prompts])


def in_words(prompt: ConceptPrompt, concepts: ConceptSet) -> str:
    """Return a prompt with each concept as the words it started from, as Break-a-Scene compares it."""
    known = {concept.name: concept.words for concept in concepts.concepts}

    def words(concept: Concept) -> str:
        found = concept.words or known.get(concept.name, "")
        return THING if not found or embedding_name(found) else found

    return "".join(part if isinstance(part, str) else words(part) for part in prompt.parts)


def require_prompts(prompts: Sequence[ConceptPrompt], concepts: ConceptSet) -> None:
    """Refuse prompts that mark no concept, or one that was not learned.

    Raises:
        UserError: there are none, or one of them is of that kind; the message says which.
    """
    if not prompts:
        raise UserError(
            "No prompt to draw. Give at least one, such as: a photo of <rex> on a beach"
        )
    known = ", ".join(f"<{name}>" for name in concepts.names)
    for number, prompt in enumerate(prompts, start=1):
        strange = [f"<{name}>" for name in prompt.names if name not in concepts.names]
        if strange or not prompt.names:
            what = f"marks {', '.join(strange)}" if strange else "marks no concept"
            raise UserError(
                f"Prompt {number} {what}: {str(prompt)!r}. Expected some of the learned concepts: {known}."
            )
        require_no_weights(str(prompt))


def read_prompts(lines: str) -> tuple[ConceptPrompt, ...]:
    """Return one prompt per line; empty lines and those that begin with # are left out.

    Raises:
        UserError: a prompt is malformed.
    """
    texts = [line.strip() for line in lines.splitlines()]
    return tuple(ConceptPrompt.parse(text) for text in texts if text and not text.startswith("#"))
