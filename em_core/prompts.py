"""Concepts and the prompts they stand in: `a photo of <rex:dog> and <doll:old doll> on grass`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import UserError

ConceptVectors = Mapping[str, Mapping[str, Tensor]]
"""Concept name -> text encoder name -> token vectors [n, d]."""

WORD = re.compile(r"[^\W\d_][\w']*")
MARK = re.compile(r"<([^<>]*)>")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
EXAMPLE = "a photo of <rex:dog> and <doll:old doll> on <shore:beach>"


@dataclass(frozen=True)
class Concept:
    """A visual concept: a name, and the words its token vectors start from ("" = random start)."""

    name: str
    words: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UserError(
                f"Bad concept name {self.name!r}. Expected a letter followed by letters, digits, "
                "'_' or '-', at most 64 in all, as in <rex:dog>."
            )

    def __str__(self) -> str:
        return f"<{self.name}:{self.words}>" if self.words else f"<{self.name}>"


@dataclass(frozen=True)
class ConceptPrompt:
    """A prompt as a sequence of plain text and concepts. A concept stands in it at most once."""

    parts: tuple[str | Concept, ...]

    @classmethod
    def parse(cls, text: str) -> "ConceptPrompt":
        """Read `<name:initial words>` and `<name>` marks; any other text stays as it is.

        Raises:
            UserError: a mark is malformed, or a name stands twice.
        """
        parts: list[str | Concept] = []
        end = 0
        for mark in MARK.finditer(text):
            parts += [text[end : mark.start()], read_mark(mark[1])]
            end = mark.end()
        parts.append(text[end:])
        if any(isinstance(p, str) and ("<" in p or ">" in p) for p in parts):
            raise UserError(
                f"Unbalanced '<' or '>' in the prompt {text!r}. Write concepts as in: {EXAMPLE}"
            )
        prompt = cls(tuple(p for p in parts if p != ""))
        twice = {name for name in prompt.names if prompt.names.count(name) > 1}
        if twice:
            raise UserError(
                f"Concept {', '.join(sorted(twice))} stands more than once in {text!r}. "
                "Write each concept once per prompt."
            )
        return prompt

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(p for p in self.parts if isinstance(p, Concept))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.concepts)

    def require_concepts(self) -> "ConceptPrompt":
        """Itself, or a UserError where there is no concept to learn."""
        if not self.concepts:
            raise UserError(
                f"No concept in the prompt {str(self)!r}. Mark what is to be learned, as in: {EXAMPLE}"
            )
        return self

    def plain(self) -> str:
        """The prompt with each concept written as its initial words."""
        return "".join(p if isinstance(p, str) else p.words for p in self.parts)

    def subset(self, names: Sequence[str]) -> "ConceptPrompt":
        """`a photo of <a> and <b>` with the named concepts in this order (Break-a-Scene's union sampling)."""
        by_name = {c.name: c for c in self.concepts}
        parts: list[str | Concept] = []
        for i, name in enumerate(names):
            parts += ["a photo of " if i == 0 else " and ", by_name[name]]
        return ConceptPrompt(tuple(parts))

    def __str__(self) -> str:
        return "".join(str(p) for p in self.parts)


def read_mark(inside: str) -> Concept:
    """The concept that a mark's inside `name:initial words` stands for."""
    name, _, words = inside.partition(":")
    return Concept(name.strip(), " ".join(words.split()))


def merge_concepts(prompts: Iterable[ConceptPrompt]) -> tuple[Concept, ...]:
    """Every concept once, in order of first appearance; initial words may stand in any of the prompts.

    Raises:
        UserError: two prompts give one concept different initial words.
    """
    merged: dict[str, Concept] = {}
    for concept in (c for prompt in prompts for c in prompt.concepts):
        known = merged.setdefault(concept.name, concept)
        if known.words and concept.words and known.words != concept.words:
            raise UserError(
                f"Concept {concept.name} starts from {known.words!r} in one prompt and from "
                f"{concept.words!r} in another. Give it the same initial words, or name them once."
            )
        if concept.words:
            merged[concept.name] = concept
    return tuple(merged.values())


def require_known(text: str, known: Iterable[str]) -> None:
    """Refuse words that a model was never shown.

    Raises:
        UserError: there are some; it lists those that the model knows.
    """
    words = set(known)
    unknown = [word for word in WORD.findall(text.lower()) if word not in words]
    if unknown:
        raise UserError(
            f"This model does not know the word {', '.join(map(repr, unknown))}. "
            f"It knows: {', '.join(sorted(words))}."
        )
