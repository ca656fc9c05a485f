"""The result of a run: a value that can be saved, loaded, and applied to a model by its host."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import Notice, UserError
from ..examples import Example
from ..files import read_outline, read_tensors, write_tensors
from ..method.joint import learned_weights
from ..method.problem import Problem
from ..method.state import Curves, RunState
from ..model.identity import ModelIdentity
from ..prompts import Concept, ConceptPrompt
from ..settings import to_json
from .truth import last_iou, truth_digest, without_iou

KIND = "visual-concepts concepts 2"
WITHOUT_CHECKSUM = "visual-concepts concepts 1"
SAME_WEIGHTS = 0.02


@dataclass(frozen=True)
class Outline:
    """What a concept file is about, as far as its header says.

    Attributes:
        names: of the concepts.
        has_weights: whether weights of the model were learned with them.
    """

    names: tuple[str, ...]
    has_weights: bool

    @classmethod
    def read(cls, path: Path | str) -> "Outline":
        """Read the header of a concept file, which tells nothing of whether the rest is whole.

        Raises:
            UserError: the file does not exist, is cut off, or is of a different kind.
        """
        tensors, plain = read_outline(Path(path), KIND, WITHOUT_CHECKSUM)
        try:
            names = tuple(str(name) for name, _ in plain["concepts"])
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is an incomplete concept file ({error!r}). Save it again."
            ) from error
        return cls(names, any(name.startswith("weights/") for name in tensors))


@dataclass(frozen=True)
class ConceptSet:
    """Learned concepts.

    Attributes:
        concepts: the concepts' names and the words they started from.
        vectors: concept -> encoder -> token vectors [n, d].
        identity: identity of the model that the concepts were learned on.
        weights: `<path>.lora_down`, `.lora_up` or `.diff` tensors; empty if only tokens were learned.
        lora_scale: alpha / rank of the LoRA.
        prompts: one prompt per picture.
        masks: per picture, concept -> mask at the training size.
        settings: the run's settings as JSON values.
        curves: name -> [(step, value)].
        truth: digest of the true masks that the IoU curves compare with, "" if there were none.
    """

    FILE: ClassVar[str] = ".concepts.safetensors"
    concepts: tuple[Concept, ...]
    vectors: Mapping[str, Mapping[str, Tensor]]
    identity: ModelIdentity
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    lora_scale: float = 1.0
    prompts: tuple[str, ...] = ()
    masks: tuple[Mapping[str, Bool[Tensor, "_ _"]], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    truth: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    def save(self, path: Path | str) -> None:
        """Write the concept file, in full or not at all.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        tensors, plain = self.to_parts()
        write_tensors(Path(path), tensors, KIND, plain)

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a file holds: tensors by name, and JSON values."""
        tensors = {
            f"vectors/{name}/{encoder}": v
            for name, by_encoder in self.vectors.items()
            for encoder, v in by_encoder.items()
        }
        tensors |= {f"weights/{name}": weight for name, weight in self.weights.items()}
        tensors |= {
            f"masks/{number}/{name}": mask
            for number, masks in enumerate(self.masks)
            for name, mask in masks.items()
        }
        tensors["model/sample"] = self.identity.sample
        plain = {
            "concepts": [[concept.name, concept.words] for concept in self.concepts],
            "family": self.identity.family,
            "architecture": self.identity.architecture,
            "encoders": dict(self.identity.encoders),
            "lora_scale": self.lora_scale,
            "prompts": self.prompts,
            "settings": self.settings,
            "curves": self.curves,
            "truth": self.truth,
        }
        return tensors, plain

    @classmethod
    def load(cls, path: Path | str) -> "ConceptSet":
        """Read a concept file; one from before there were checksums is read with a warning.

        Raises:
            UserError: the file does not exist, is damaged, is of a different kind, or is incomplete.
        """
        tensors, plain = read_tensors(Path(path), KIND, WITHOUT_CHECKSUM)
        try:
            found = cls.from_parts(tensors, plain)
            found.require_whole(tensors)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is an incomplete concept file ({error!r}). Save it again."
            ) from error
        return found

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], plain: dict[str, Any]) -> "ConceptSet":
        """Build the set from a file's tensors and JSON values; KeyError if any are missing."""
        concepts = tuple(Concept(name, words) for name, words in plain["concepts"])
        encoders = plain["encoders"]
        vectors = {
            concept.name: {
                encoder: tensors[f"vectors/{concept.name}/{encoder}"] for encoder in encoders
            }
            for concept in concepts
        }
        prompts = tuple(plain["prompts"])
        return cls(
            concepts=concepts,
            vectors=vectors,
            identity=ModelIdentity(
                plain["family"], plain["architecture"], encoders, tensors["model/sample"]
            ),
            weights=below(tensors, "weights/"),
            lora_scale=plain["lora_scale"],
            prompts=prompts,
            masks=tuple(
                in_order_of(prompt, below(tensors, f"masks/{number}/"))
                for number, prompt in enumerate(prompts)
            ),
            settings=plain["settings"],
            curves={
                name: tuple((step, value) for step, value in points)
                for name, points in plain["curves"].items()
            },
            truth=plain.get("truth", ""),
        )

    def require_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Check what was read from a file that has no checksum to vouch for it.

        Raises:
            ValueError: a value is of the wrong type or shape, or a tensor of the file has no place here.
        """
        count = 1 + sum(map(len, self.vectors.values())) + len(self.weights)
        count += sum(map(len, self.masks))
        fine = {
            "concepts": len(set(self.names)) == len(self.names) and count == len(tensors),
            "encoders": all(
                type(width) is int and v[encoder].ndim == 2 and v[encoder].shape[1] == width
                for v in self.vectors.values()
                for encoder, width in self.identity.encoders.items()
            ),
            "vectors": all(is_real(v) for of in self.vectors.values() for v in of.values()),
            "weights": all(is_real(weight) for weight in self.weights.values()),
            "masks": all(
                mask.dtype == torch.bool and mask.ndim == 2 for of in self.masks for mask in of.values()
            ),
            "model": is_real(self.identity.sample) and self.identity.sample.ndim == 1,
            "lora_scale": is_number(self.lora_scale),
            "words": all(
                isinstance(text, str)
                for text in (*(c.words for c in self.concepts), *self.prompts, self.identity.family,
                             self.identity.architecture, self.truth)
            ),
            "settings": isinstance(self.settings, Mapping),
            "curves": all(
                type(step) is int and is_number(value)
                for points in self.curves.values()
                for step, value in points
            ),
        }  # fmt: skip
        wrong = [what for what, good in fine.items() if not good]
        if wrong:
            raise ValueError(f"bad {', '.join(wrong)}")

    def compared(self, examples: Sequence[Example]) -> "ConceptSet":
        """Return the concepts of a run with IoU curves of these examples' true masks.

        If the run saw other ones, the curves have one point: that of its last masks.
        """
        seen = truth_digest(examples)
        if seen == self.truth:
            return self
        again = last_iou(self.curves, self.masks, examples)
        return replace(self, curves={**without_iou(self.curves), **again}, truth=seen)

    def require_fit(self, identity: ModelIdentity, *, any_weights: bool = False) -> None:
        """Refuse a model that the concepts do not fit.

        A different architecture never fits. A different model of the same architecture (a fine-tune)
        is refused too, unless `any_weights` is set; then there is only a warning. Concepts of other
        programs tell no architecture, and fit every model of their family.

        Raises:
            UserError: the model does not fit.
        """
        known = self.identity.architecture
        if dict(self.identity.encoders) != dict(identity.encoders) or (
            known and known != identity.architecture
        ):
            raise UserError(
                "This model has a different architecture from the one that the concepts were learned on. "
                f"Expected {self.identity.family} with text encoders of width {dict(self.identity.encoders)}, "
                f"got {identity.family} with {dict(identity.encoders)}. Load the model they were learned on."
            )
        if not known:
            return
        ours, theirs = self.identity.sample, identity.sample
        if torch.dist(ours, theirs) <= SAME_WEIGHTS * ours.norm():
            return
        message = (
            "These concepts were learned on a different model of the same architecture. Load that model, or "
            "allow any weights (--any-weights): they often work on a fine-tune of it, but less faithfully."
        )
        if not any_weights:
            raise UserError(message)
        warnings.warn(message, Notice, stacklevel=2)


def is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def in_order_of(prompt: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks in the order of their prompt; files have them by the alphabet."""
    names = ConceptPrompt.parse(prompt).names
    return {name: masks[name] for name in sorted(masks, key=[*names, *masks].index)}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under names without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def conclude(problem: Problem, state: RunState) -> ConceptSet:
    """Return the concepts that a run's state holds."""
    joint = problem.joint
    return ConceptSet(
        concepts=problem.concepts,
        vectors={
            concept: {encoder: v.detach().cpu().clone() for encoder, v in by_encoder.items()}
            for concept, by_encoder in state.vectors.items()
        },
        identity=problem.host.identity(),
        weights={name: weight.cpu() for name, weight in learned_weights(problem, state).items()},
        lora_scale=joint.lora_alpha / joint.rank if joint.kind == "lora" else 1.0,
        prompts=tuple(str(prepared.example.prompt) for prepared in problem.pictures),
        masks=tuple(
            dict(zip(prepared.names, picture.labels.cpu(), strict=True))
            for prepared, picture in zip(problem.pictures, state.pictures, strict=True)
        ),
        settings={"em": to_json(problem.settings), "joint": to_json(joint)},
        curves=state.curves,
        truth=truth_digest([prepared.example for prepared in problem.pictures]),
    )
