"""A visual condition: concepts with image attention and what it looks at, as a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from ..errors import UserError
from ..examples import Example
from ..files import read_tensors, write_tensors
from ..method.problem import Problem
from ..method.state import RunState
from ..model.visual_drawing import Reference, VisualUse
from ..settings import VisualSettings, from_json, to_json
from .concept_set import ConceptSet, below, conclude, is_real

KIND = "visual-concepts visual condition 1"


@dataclass(frozen=True)
class VisualCondition:
    """What was learned of concepts that a word cannot carry (ViCo, arXiv 2306.00971).

    Attributes:
        concepts: the concepts with their tokens as they were learned together with the blocks, and the
            weights that were applied meanwhile.
        blocks: `<concept>/<number of the place>/<name>` -> parameters of image attention.
        references: what is looked at, if nothing else is given.
        settings: how it was learned.
    """

    FILE: ClassVar[str] = ".condition.safetensors"
    concepts: ConceptSet
    blocks: Mapping[str, Tensor]
    references: tuple[Reference, ...]
    settings: VisualSettings = field(default_factory=VisualSettings)

    @property
    def names(self) -> tuple[str, ...]:
        """The concepts that have image attention."""
        return tuple(dict.fromkeys(path.partition("/")[0] for path in self.blocks))

    def use(self, strength: float = 1.0, span: tuple[float, float] = (0.0, 1.0)) -> VisualUse:
        """The condition as it is applied.

        Args:
            strength: factor of what the blocks add, 0 to 2.
            span: the part of the sampling in which they act, as shares (start, end) of the schedule.

        Raises:
            UserError: a value is out of range.
        """
        settings = self.settings
        return VisualUse(
            self.blocks, self.references, settings.gated, settings.own_prompts, strength, *span
        )

    def compared(self, examples: Sequence[Example]) -> "VisualCondition":
        """Return the condition with IoU curves of these examples' true masks."""
        return replace(self, concepts=self.concepts.compared(examples))

    def save(self, path: Path | str) -> None:
        """Write the condition file, in full or not at all.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        of_concepts, plain = self.concepts.to_parts()
        tensors = {f"concepts/{name}": x for name, x in of_concepts.items()}
        tensors |= {f"blocks/{name}": x for name, x in self.blocks.items()}
        for number, reference in enumerate(self.references):
            tensors[f"references/{number}/latent"] = reference.latent
            masks = {name: m for name, m in reference.masks.items() if m is not None}
            tensors |= {f"references/{number}/masks/{name}": m for name, m in masks.items()}
        described = {
            "concepts": plain,
            "references": [list(reference.masks) for reference in self.references],
            "settings": to_json(self.settings),
        }
        write_tensors(Path(path), tensors, KIND, described)

    @classmethod
    def load(cls, path: Path | str) -> "VisualCondition":
        """Read a condition file.

        Raises:
            UserError: the file does not exist, is damaged, is of a different kind, or is incomplete.
        """
        tensors, plain = read_tensors(Path(path), KIND)
        try:
            concepts = ConceptSet.from_parts(below(tensors, "concepts/"), plain["concepts"])
            references = tuple(
                reference_of(below(tensors, f"references/{number}/"), names)
                for number, names in enumerate(plain["references"])
            )
            settings = from_json(VisualSettings, plain["settings"])
            found = cls(concepts, below(tensors, "blocks/"), references, settings)
            found.require_whole(tensors)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is an incomplete visual condition ({error!r}). Save it again."
            ) from error
        return found

    def require_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Check the types of what was read.

        Raises:
            ValueError: a value is of the wrong type or shape.
        """
        self.concepts.require_whole(below(tensors, "concepts/"))
        fine = {
            "blocks": bool(self.blocks) and all(is_real(x) for x in self.blocks.values()),
            "names": set(self.names) <= set(self.concepts.names),
            "latents": all(is_real(r.latent) and r.latent.ndim == 3 for r in self.references),
        }
        wrong = [what for what, good in fine.items() if not good]
        if wrong:
            raise ValueError(f"bad {', '.join(wrong)}")


def reference_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Reference:
    """Build a reference from a file's tensors; KeyError if the latent is missing."""
    masks = below(tensors, "masks/")
    return Reference(tensors["latent"], {name: masks.get(name) for name in names})


def conclude_condition(
    problem: Problem, state: RunState, started: ConceptSet | None = None
) -> VisualCondition:
    """Return the visual condition that a run's state holds.

    Args:
        problem, state: of the run.
        started: the concepts that it started from, whose weights were applied meanwhile.
    """
    concepts = conclude(problem, state)
    if started is not None and started.weights:
        kept = {"weights": started.weights, "lora_scale": started.lora_scale}
        concepts = replace(concepts, **kept)  # type: ignore[arg-type]
    visual = problem.visual or VisualSettings()
    blocks = {name: x.detach().cpu().float().clone() for name, x in state.weights.items()}
    return VisualCondition(concepts, blocks, references_of(problem, state, visual), visual)


def references_of(
    problem: Problem, state: RunState, visual: VisualSettings
) -> tuple[Reference, ...]:
    """The run's pictures as references of the concepts that were found in them."""
    found = []
    for prepared, picture in zip(problem.pictures, state.pictures, strict=True):
        masks: dict[str, Tensor | None] = {}
        for name, mask, there in zip(
            prepared.names, picture.labels.cpu(), picture.found.tolist(), strict=True
        ):
            if there:
                masks[name] = mask.clone() if visual.key_masks == "em" else None
        if masks:
            found.append(Reference(prepared.Z0[0].detach().cpu().clone(), masks))
    return tuple(found)
