"""Captions of the demo world, in the many forms that users write them."""

from collections.abc import Sequence
from dataclasses import dataclass

from numpy.random import Generator

from . import vocabulary

Look = tuple[str, str, str]


@dataclass(frozen=True)
class Caption:
    """Words of a caption, where the nouns stand, and which object each of them means.

    `nouns[i]` is a word's position and `meant[i]` the object's index; `ground` is the position of
    the background's word, or None. Every word is one token, so a word at position i stands in
    column i + 1 of the encoded prompt.
    """

    words: tuple[str, ...]
    nouns: tuple[int, ...]
    meant: tuple[int, ...]
    ground: int | None

    @property
    def text(self) -> str:
        """The caption as a user would write it."""
        return " ".join(self.words)


EMPTY = Caption((), (), (), None)


def full_caption(looks: Sequence[Look], background: str) -> Caption:
    """The caption that says everything: `a photo of a red striped star and ... on grass`."""
    phrases = [["a", colour, pattern, shape] for shape, colour, pattern in looks]
    for phrase in phrases:
        phrase[0] = "an" if phrase[1] == "orange" else "a"
    return _join(["a", "photo", "of"], phrases, list(range(len(looks))), ["on"], background)


def bare_caption(looks: Sequence[Look], background: str, generic: bool = False) -> Caption:
    """Nouns alone, as prompts for concepts are: `a photo of star and circle on grass`."""
    phrases = [[vocabulary.GENERIC if generic else shape] for shape, _, _ in looks]
    return _join(["a", "photo", "of"], phrases, list(range(len(looks))), ["on"], background)


def random_caption(
    looks: Sequence[Look], background: str, rng: Generator, empty: float = 0.1
) -> Caption:
    """A caption of objects that are given from left to right.

    Articles, `a photo of`, adjectives and the background are dropped at random, some nouns become
    the generic word, and the share `empty` of captions is empty. Objects that their phrases do not
    tell apart are always named from left to right; otherwise a third of captions shuffles them.
    """
    if rng.random() < empty:
        return EMPTY
    articles = rng.random() < 0.5
    detail = str(rng.choice(("full", "bare", "mixed"), p=(0.5, 0.25, 0.25)))
    all_generic = rng.random() < 0.05
    phrases = [_phrase(look, articles, detail, all_generic, rng) for look in looks]
    order = list(range(len(looks)))
    if len({tuple(phrase) for phrase in phrases}) == len(phrases) and rng.random() < 1 / 3:
        rng.shuffle(order)
    before = ["a", "photo", "of"] if rng.random() < 0.6 else []
    after = ["in" if rng.random() < 0.1 else "on"] if rng.random() < 0.8 else []
    if after and articles and rng.random() < 0.15:
        after.append("the")
    return _join(before, phrases, order, after, background)


def _phrase(look: Look, articles: bool, detail: str, generic: bool, rng: Generator) -> list[str]:
    shape, colour, pattern = look
    noun = vocabulary.GENERIC if generic or rng.random() < 0.09 else shape
    keep = {"full": 1.0, "bare": 0.0, "mixed": 0.5}[detail]
    words = [word for word in (colour, pattern) if rng.random() < keep]
    if pattern == "plain" and words[-1:] == ["plain"] and rng.random() < 0.4:
        words.pop()
    words.append(noun)
    if articles:
        words.insert(0, _article(words[0], rng))
    return words


def _article(next_word: str, rng: Generator) -> str:
    if rng.random() < 0.1:
        return "the"
    return "an" if next_word == "orange" else "a"


def _join(
    before: list[str], phrases: list[list[str]], order: list[int], after: list[str], background: str
) -> Caption:
    words = list(before)
    nouns: list[int] = []
    for index in order:
        if nouns:
            words.append("and")
        words += phrases[index]
        nouns.append(len(words) - 1)
    if not after:
        return Caption(tuple(words), tuple(nouns), tuple(order), None)
    words += [*after, background]
    return Caption(tuple(words), tuple(nouns), tuple(order), len(words) - 1)
