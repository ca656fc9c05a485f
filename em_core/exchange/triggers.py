"""Trigger words: rare pieces of CLIP's vocabulary whose rows of the token table learned tokens take over."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from ..prompts import ConceptVectors

Triggers = Mapping[str, tuple[str, ...]]
"""Concept -> its trigger words, one for each of its vectors."""

# Among the last merges of CLIP's vocabulary, hence rare; no words, nor names that come to mind.
RARE = (
    "sks", "ohwx", "hns", "bsf", "gsc", "snf", "ndc", "tyl", "pkk", "bln", "npt", "tzky",
    "csg", "tdp", "hcs", "ttm", "cbp", "smx", "tbr", "swfl", "lyk", "kprs", "yql", "tmw",
    "tym", "thn", "slv", "wrs", "cws", "fhs", "lhp", "kly", "bhk", "lys", "tsb", "ygk",
    "rsl", "skc", "psv", "tvn", "msy", "nts", "hts", "tsk", "vcs", "hsc", "shc", "nmd",
    "wsw", "bbly", "mmj", "srp", "gbc", "dcs", "ncs", "nbl", "mtc", "swc", "ghc", "kpk",
    "sff", "mdc", "chd", "dss",
)  # fmt: skip
WORD = re.compile(r"[a-z]+")
COMMON = 20_000
HOW = "as in 'rex: sks, doll: ohwx olis'"


@dataclass(frozen=True)
class Vocabulary:
    """What a text encoder's tokenizer and token table are to a trigger word.

    Attributes:
        pieces: gives the ids of the pieces that a text consists of, without begin and end tokens.
        table: the token table [v, d] of the model as it was loaded, without patches.
    """

    pieces: Callable[[str], list[int]]
    table: Float[Tensor, "v d"]

    def is_piece(self, word: str) -> bool:
        """Return whether a word is a single piece of the vocabulary, also between other words."""
        (*ids,) = self.pieces(word)
        return len(ids) == 1 and self.pieces(f"a {word}, {word}").count(ids[0]) == 2


Vocabularies = Mapping[str, Vocabulary]
"""Text encoder -> its vocabulary."""


def read_triggers(text: str, names: Sequence[str], once: bool = True) -> dict[str, tuple[str, ...]]:
    """Read the trigger words that a user has named: `rex: sks, doll: ohwx olis`.

    With a single concept its name may be left out. Concepts that are not named get words that are
    chosen for them. No word may stand twice, if each is to be used `once`.

    Raises:
        UserError: the text is malformed, names no concept of `names`, or gives a word twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        name, mark, words = part.partition(":")
        if not mark and len(names) == 1:
            name, words = names[0], part
        name, given = name.strip(), tuple(words.lower().split())
        if name not in names or not given or name in found:
            raise UserError(
                f"Bad trigger words {part!r}. Expected the name of a concept ({', '.join(names)}) once, and its "
                f"words, {HOW}."
            )
        found[name] = given
    if once:
        require_distinct(found)
    return found


def require_distinct(triggers: Triggers) -> None:
    """Refuse trigger words that stand for more than one vector.

    Raises:
        UserError: there is such a word.
    """
    words = [word for of in triggers.values() for word in of]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise UserError(
            f"The trigger word {', '.join(twice)} is given twice. Expected a word of its own for each vector of "
            f"each concept, {HOW}."
        )


def require_pieces(words: Sequence[str], vocabularies: Vocabularies) -> None:
    """Refuse trigger words that are not single pieces of each text encoder's vocabulary.

    Raises:
        UserError: there is such a word.
    """
    for word in words:
        for encoder, vocabulary in vocabularies.items():
            if WORD.fullmatch(word) and vocabulary.is_piece(word):
                continue
            count = len(vocabulary.pieces(word))
            raise UserError(
                f"The trigger word {word!r} cannot stand for a token. Expected lower-case letters that are one "
                f"piece of the vocabulary of {encoder}, got {count} pieces. Use rare words such as "
                f"{', '.join(RARE[:4])}, or leave the words out to have some chosen."
            )


def choose_triggers(
    vectors: ConceptVectors, vocabularies: Vocabularies, named: Triggers, taken: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return the trigger words of each concept: those that were named, or rare ones that are free.

    A concept of a name that has words in `taken` already gets the same again, so that a file that
    is saved anew works in the same prompts.

    Args:
        vectors: those of the concepts.
        vocabularies: those of the model's text encoders.
        named: words that the user wants.
        taken: word -> the concept that it stands for in other files.

    Raises:
        UserError: a named word is not a single piece, their number is not that of the vectors, or no
            rare words are left.
    """
    chosen = dict(named)
    counts = {name: len(next(iter(by.values()))) for name, by in vectors.items()}
    for name, words in named.items():
        if len(words) != counts[name]:
            raise UserError(
                f"Bad number of trigger words for {name}. Expected {counts[name]}, one for each of its vectors, "
                f"got {len(words)} ({' '.join(words)})."
            )
        require_pieces(words, vocabularies)
    for name, count in counts.items():
        if name not in chosen:
            others = {word for words in chosen.values() for word in words}
            free = [w for w in RARE if w not in others and taken.get(w, name) == name]
            chosen[name] = pick(free, count, vocabularies, taken)
    require_distinct(chosen)
    return {name: chosen[name] for name in vectors}


def pick(
    free: Sequence[str], count: int, vocabularies: Vocabularies, own: Mapping[str, str]
) -> tuple[str, ...]:
    """Return so many of the free words that every vocabulary has as a piece, those in `own` first."""
    usable = [w for w in free if all(v.is_piece(w) for v in vocabularies.values())]
    usable.sort(key=lambda word: word not in own)
    if len(usable) < count:
        raise UserError(
            f"No rare words are left for {count} vectors: other files of the folder use them. Name trigger words "
            f"of your own, {HOW}, or save into another folder."
        )
    return tuple(usable[:count])


def common_words(triggers: Triggers, vocabularies: Vocabularies) -> tuple[str, ...]:
    """Return the trigger words that are frequent: early pieces of the vocabulary, as its merges are sorted."""
    first = next(iter(vocabularies.values()), None)
    if first is None:
        return ()
    words = (word for of in triggers.values() for word in of)
    return tuple(word for word in words if first.pieces(word)[0] < COMMON)
