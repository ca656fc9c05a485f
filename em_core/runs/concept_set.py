"""What a run ends with: a value that is saved, loaded and applied to a model by its host."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors, write_tensors
from ..method.joint import learned_weights
from ..method.problem import Problem
from ..method.state import Curves, RunState
from ..model.identity import ModelIdentity
from ..prompts import Concept
from ..settings import to_json

KIND = "visual-concepts concepts 1"
SAME_WEIGHTS = 0.02


@dataclass(frozen=True)
class ConceptSet:
    """Learned concepts.

    Attributes:
        concepts: names and the words they started from.
        vectors: concept -> encoder -> token vectors [n, d].
        identity: of the model that they were learned on.
        weights: `<path>.lora_down`, `.lora_up` or `.diff` tensors; empty where only tokens were learned.
        lora_scale: alpha / rank.
        prompts: one per picture.
        masks: per picture, concept -> mask at the size of training.
        settings: the run's settings as JSON values.
        curves: name -> [(step, value)].
    """

    concepts: tuple[Concept, ...]
    vectors: Mapping[str, Mapping[str, Tensor]]
    identity: ModelIdentity
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    lora_scale: float = 1.0
    prompts: tuple[str, ...] = ()
    masks: tuple[Mapping[str, Bool[Tensor, "_ _"]], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    def save(self, path: Path | str) -> None:
        """Write the concept file, whole or not at all."""
        tensors = {f"vectors/{c}/{e}": v for c, of in self.vectors.items() for e, v in of.items()}
        tensors |= {f"weights/{name}": w for name, w in self.weights.items()}
        tensors |= {
            f"masks/{i}/{name}": m for i, of in enumerate(self.masks) for name, m in of.items()
        }
        tensors["model/sample"] = self.identity.sample
        plain = {
            "concepts": [[c.name, c.words] for c in self.concepts],
            "family": self.identity.family,
            "architecture": self.identity.architecture,
            "encoders": dict(self.identity.encoders),
            "lora_scale": self.lora_scale,
            "prompts": self.prompts,
            "settings": self.settings,
            "curves": self.curves,
        }
        write_tensors(Path(path), tensors, KIND, plain)

    @classmethod
    def load(cls, path: Path | str) -> "ConceptSet":
        """Read a concept file.

        Raises:
            UserError: no such file, damaged, of another kind, or incomplete.
        """
        tensors, plain = read_tensors(Path(path), KIND)
        try:
            return cls.from_parts(tensors, plain)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is an incomplete concept file ({error!r}). Save it again."
            ) from error

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], plain: dict[str, Any]) -> "ConceptSet":
        concepts = tuple(Concept(name, words) for name, words in plain["concepts"])
        encoders = plain["encoders"]
        vectors = {
            c.name: {e: tensors[f"vectors/{c.name}/{e}"] for e in encoders} for c in concepts
        }
        count = len(plain["prompts"])
        return cls(
            concepts=concepts,
            vectors=vectors,
            identity=ModelIdentity(
                plain["family"], plain["architecture"], encoders, tensors["model/sample"]
            ),
            weights=below(tensors, "weights/"),
            lora_scale=plain["lora_scale"],
            prompts=tuple(plain["prompts"]),
            masks=tuple(below(tensors, f"masks/{i}/") for i in range(count)),
            settings=plain["settings"],
            curves={
                name: tuple((step, value) for step, value in points)
                for name, points in plain["curves"].items()
            },
        )

    def require_fit(self, identity: ModelIdentity, *, any_weights: bool = False) -> None:
        """Refuse a model that the concepts do not fit.

        Another architecture never fits. Another model of the same architecture (a fine-tune) is
        refused too unless `any_weights` is set, which warns instead.

        Raises:
            UserError: the model does not fit.
        """
        if dict(self.identity.encoders) != dict(identity.encoders) or (
            self.identity.architecture != identity.architecture
        ):
            raise UserError(
                f"These concepts were learned on a {self.identity.family} model "
                f"(text width {dict(self.identity.encoders)}), this is a {identity.family} model "
                f"({dict(identity.encoders)}) of another architecture. Load the model they were learned on."
            )
        ours, theirs = self.identity.sample, identity.sample
        if torch.dist(ours, theirs) <= SAME_WEIGHTS * ours.norm():
            return
        message = (
            "These concepts were learned on another model of the same architecture. Load that model, "
            "or allow any weights (--any-weights): they often work on a fine-tune of it, less faithfully."
        )
        if not any_weights:
            raise UserError(message)
        warnings.warn(message, stacklevel=2)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def conclude(problem: Problem, state: RunState) -> ConceptSet:
    """The concepts as a run's state holds them."""
    joint = problem.joint
    return ConceptSet(
        concepts=problem.concepts,
        vectors={
            concept: {encoder: v.detach().cpu().clone() for encoder, v in by_encoder.items()}
            for concept, by_encoder in state.vectors.items()
        },
        identity=problem.host.identity(),
        weights={name: w.cpu() for name, w in learned_weights(problem, state).items()},
        lora_scale=joint.alpha / joint.rank if joint.kind == "lora" else 1.0,
        prompts=tuple(str(p.example.prompt) for p in problem.pictures),
        masks=tuple(
            dict(zip(p.names, s.labels.cpu(), strict=True))
            for p, s in zip(problem.pictures, state.pictures, strict=True)
        ),
        settings={"em": to_json(problem.settings), "joint": to_json(joint)},
        curves=state.curves,
    )
