"""Concepts and the prompts that contain them: `a photo of <rex:dog> and <doll:old doll> on grass`."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import Notice, UserError, did_you_mean

ConceptVectors = Mapping[str, Mapping[str, Tensor]]
"""Concept name -> text encoder name -> token vectors [n, d]."""

WORD = re.compile(r"[^\W\d_][\w']*")
LISTED = re.compile(r"\s*(,|and|&|,\s*and)?\s*((a|an|the)\s+)?", re.IGNORECASE)
MARK = re.compile(r"<([^<>]*)>")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
PLAIN_NAME = re.compile(r"[a-z][a-z0-9_-]*")
EMBEDDING = "embedding:"
LOADERS = ("lora", "lyco", "lycoris", "hypernet")
WEIGHT = re.compile(r"\((?:[^()<>]|<[^<>]*>)*:\s*[+-]?\d*\.?\d+\s*\)")
EXAMPLE = "a photo of <rex:dog> and <doll:old doll> on <shore:beach>"


@dataclass(frozen=True)
class Concept:
    """A visual concept: a name, and the words that its token vectors start from ("" for a random start)."""

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
    """A prompt as a sequence of plain text and concepts, each of which appears at most once."""

    parts: tuple[str | Concept, ...]

    @classmethod
    def parse(cls, text: str) -> "ConceptPrompt":
        """Read `<name:initial words>` and `<name>` marks; any other text stays as it is.

        Raises:
            UserError: a mark is malformed, or a name appears twice, also in another case.
        """
        parts: list[str | Concept] = []
        end = 0
        for mark in MARK.finditer(text):
            parts += [text[end : mark.start()], read_mark(mark[1])]
            end = mark.end()
        parts.append(text[end:])
        if any(isinstance(part, str) and ("<" in part or ">" in part) for part in parts):
            raise UserError(
                f"Unbalanced '<' or '>' in the prompt {text!r}. Write concepts as in: {EXAMPLE}"
            )
        prompt = cls(tuple(part for part in parts if part != ""))
        require_apart(prompt.names)
        twice = {name for name in prompt.names if prompt.names.count(name) > 1}
        if twice:
            raise UserError(
                f"Concept {', '.join(sorted(twice))} appears more than once in {text!r}. "
                "Write each concept once per prompt."
            )
        return prompt

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(part for part in self.parts if isinstance(part, Concept))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)

    def require_concepts(self, known: Iterable[str] = ()) -> "ConceptPrompt":
        """Return the prompt itself if it marks any concept.

        Args:
            known: names of learned concepts, one of which may be meant by a plain word.

        Raises:
            UserError: it marks none.
        """
        if self.concepts:
            return self
        plain = self.plain_names(known)
        hint = f"Mark what to learn or find, as in: {EXAMPLE}"
        if plain:
            hint = f"{' and '.join(plain)} is a plain word there. Write {in_marks(plain)} for what was learned."
        raise UserError(f"No concept in the prompt {str(self)!r}. {hint}")

    def plain_names(self, known: Iterable[str]) -> list[str]:
        """Return the known concepts whose names stand in the prompt as plain words, and not as `<name>`."""
        text = " ".join(part for part in self.parts if isinstance(part, str)).casefold()
        words = set(PLAIN_NAME.findall(text))
        return [name for name in known if name.casefold() in words and name not in self.names]

    def plain(self) -> str:
        """Return the prompt with each concept replaced by its initial words."""
        return "".join(part if isinstance(part, str) else part.words for part in self.parts)

    def bare(self) -> "ConceptPrompt":
        """Return the prompt with its concepts left out, such as `a photo of  and  on sand`."""
        return ConceptPrompt(("".join(part for part in self.parts if isinstance(part, str)),))

    def orders(self) -> tuple["ConceptPrompt", ...]:
        """The prompt with the concepts of each list in it moved along their places; first as it is.

        Concepts are a list where nothing but a comma, "and" or an article stands between them: their
        order means nothing. Each has each place of its list once, if all lists are of one length.
        """
        lists: list[list[int]] = [[]]
        for index, part in enumerate(self.parts):
            if isinstance(part, Concept):
                lists[-1].append(index)
            elif not LISTED.fullmatch(part):
                lists.append([])
        orders = []
        for by in range(max(map(len, lists), default=0) or 1):
            parts = list(self.parts)
            for places in lists:
                for number, index in enumerate(places):
                    parts[index] = self.parts[places[(number + by) % len(places)]]
            orders.append(ConceptPrompt(tuple(parts)))
        return tuple(orders)

    def subset(self, names: Sequence[str]) -> "ConceptPrompt":
        """Return `a photo of <a> and <b>` with the named concepts (Break-a-Scene's union sampling)."""
        by_name = {concept.name: concept for concept in self.concepts}
        parts: list[str | Concept] = []
        for index, name in enumerate(names):
            parts += ["a photo of " if index == 0 else " and ", by_name[name]]
        return ConceptPrompt(tuple(parts))

    def __str__(self) -> str:
        return "".join(str(part) for part in self.parts)


def require_no_loader(mark: str, name: str) -> None:
    """Refuse what loads a LoRA elsewhere, as in `<lora:file:1>`.

    Raises:
        UserError: the mark is of that kind.
    """
    if name.lower() in LOADERS:
        raise UserError(
            f"{mark} in a prompt loads a file in other programs, and nothing here. Delete it; in ComfyUI, "
            "connect a Load LoRA node instead."
        )


def embedding_name(words: str) -> str | None:
    """Return the file that `embedding:file`, in place of a concept's words, names; None for ordinary words.

    Raises:
        UserError: other words stand beside it.
    """
    if EMBEDDING not in words:
        return None
    name = words.removeprefix(EMBEDDING).strip()
    if not words.startswith(EMBEDDING) or not name or " " in name:
        raise UserError(
            f"Bad start {words!r} of a concept. Expected either words or one embedding, as in "
            "<rex:embedding:my_dog>."
        )
    return name


def require_no_weights(text: str) -> None:
    """Refuse weights in a prompt that is learned from or searched for, as in `(<rex:dog>:1.3)`.

    Raises:
        UserError: there are such weights.
    """
    if found := WEIGHT.search(text):
        raise UserError(
            f"Weights such as {found[0]!r} have no place in a prompt that describes a picture: what is learned "
            "would hold for this weight alone. Delete the parentheses and the number; weights are for drawing."
        )


def read_mark(inside: str) -> Concept:
    """Return the concept that `name:initial words`, the inside of a mark, stands for.

    Raises:
        UserError: the name or the words are malformed.
    """
    name, _, words = inside.partition(":")
    require_no_loader(f"<{inside}>", name.strip())
    words = " ".join(words.split())
    embedding_name(words)
    return Concept(name.strip(), words)


def merge_concepts(prompts: Iterable[ConceptPrompt]) -> tuple[Concept, ...]:
    """Return every concept once, in order of first appearance.

    Its initial words may be given in any of the prompts.

    Raises:
        UserError: two prompts give the same concept different initial words, or write its name in
            different cases.
    """
    merged: dict[str, Concept] = {}
    found = [concept for prompt in prompts for concept in prompt.concepts]
    require_apart(concept.name for concept in found)
    for concept in found:
        known = merged.setdefault(concept.name, concept)
        if known.words and concept.words and known.words != concept.words:
            raise UserError(
                f"Concept {concept.name} starts from {known.words!r} in one prompt and from "
                f"{concept.words!r} in another. Give it the same initial words everywhere, or give them only once."
            )
        if concept.words:
            merged[concept.name] = concept
    return tuple(merged.values())


def require_apart(names: Iterable[str]) -> None:
    """Refuse names of concepts that differ only in case: files named after them would be the same one.

    Raises:
        UserError: there are such names.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"The concepts {other} and {name} differ only in upper and lower case. Windows and Macs take "
                "files of such names for the same. Rename one of them."
            )


def require_known(text: str, known: Iterable[str], unlisted: Iterable[str] = ()) -> None:
    """Refuse words that a model was never shown.

    Args:
        text: a prompt without its concepts.
        known: the words that the model was shown.
        unlisted: words that it takes besides, such as trigger words, and that the message leaves out.

    Raises:
        UserError: `text` has such words; the message lists those that the model knows.
    """
    words = set(known)
    taken = words.union(unlisted)
    unknown = [word for word in WORD.findall(text.lower()) if word not in taken]
    if unknown:
        meant = "".join(did_you_mean(word, words, "'{}'") for word in dict.fromkeys(unknown))
        raise UserError(
            f"This model does not know the word {', '.join(map(repr, unknown))}.{meant} "
            f"It knows: {', '.join(sorted(words))}."
        )


def not_learned(name: str, known: Iterable[str]) -> UserError:
    """Return the error that a prompt marks a concept that was not learned."""
    known = tuple(known)
    return UserError(
        f"Concept {name} has not been learned.{did_you_mean(name, known, '<{}>')} Known: "
        f"{', '.join(known) or 'none'}."
    )


def in_marks(names: Iterable[str]) -> str:
    """Return names as they are written in prompts: `<rex> and <doll>`."""
    return " and ".join(f"<{name}>" for name in names)


def require_use(prompts: Sequence[ConceptPrompt], known: Sequence[str]) -> None:
    """Notice prompts to draw that do not use what was learned, as where `rex` stands for `<rex>`.

    Args:
        prompts: the prompts.
        known: the names of the learned concepts.

    Raises:
        UserError: no prompt has a concept, and the name of one stands in them as a plain word. Otherwise
            there is a Notice.
    """
    if not any(prompt.names for prompt in prompts):
        for prompt in prompts:
            if prompt.plain_names(known):
                prompt.require_concepts(known)
    for prompt in prompts:
        plain = prompt.plain_names(known)
        if plain or not prompt.names:
            what = f"{' and '.join(plain)} is a plain word" if plain else "no concept is marked"
            warnings.warn(
                f"In the prompt {str(prompt)!r}, {what}. Write {in_marks(plain or known)} where what was learned "
                "is meant.",
                Notice,
                stacklevel=3,
            )
