"""Captions of the demo world, in the many forms that users write them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from numpy.random import Generator

from . import vocabulary

Look = tuple[str, str, str]
_TELLING = {*vocabulary.SHAPES, *vocabulary.COLOURS, *vocabulary.PATTERNS}


@dataclass(frozen=True)
class Caption:
    """Words of a caption, where the nouns stand, and which object each of them means.

    `nouns[i]` is a word's position, `meant[i]` the object's index and `clear[i]` whether the words
    say that it is this object; `ground` is the position of the background's word, or None. Every
    word is one token, so a word at position i stands in column i + 1 of the encoded prompt.
    """

    words: tuple[str, ...]
    nouns: tuple[int, ...]
    meant: tuple[int, ...]
    clear: tuple[bool, ...]
    ground: int | None

    @property
    def text(self) -> str:
        """The caption as a user would write it."""
        return " ".join(self.words)


EMPTY = Caption((), (), (), (), None)


def full_caption(looks: Sequence[Look], background: str) -> Caption:
    """The caption that says everything: `a photo of a red striped star and ... on grass`."""
    phrases = [["a", colour, pattern, shape] for shape, colour, pattern in looks]
    for phrase in phrases:
        phrase[0] = "an" if phrase[1] == "orange" else "a"
    return _join(["a", "photo", "of"], phrases, range(len(looks)), ["on"], background, looks)


def bare_caption(
    looks: Sequence[Look], background: str, generic: str = "", named: Sequence[int] | None = None
) -> Caption:
    """Nouns alone, as prompts for concepts are: `a photo of star and circle on grass`.

    A `generic` word takes the place of every noun; `named` are the objects to name, in order.
    """
    phrases = [[generic or shape] for shape, _, _ in looks]
    order = range(len(looks)) if named is None else named
    return _join(["a", "photo", "of"], phrases, order, ["on"], background, looks)


def random_caption(
    looks: Sequence[Look], background: str, rng: Generator, empty: float = 0.1
) -> Caption:
    """A caption of a scene's objects, in any order.

    A third of captions leave objects out where there are several. Articles, `a photo of`,
    adjectives and the background are dropped at random, some nouns become generic words, and the
    share `empty` of captions is empty.
    """
    if rng.random() < empty:
        return EMPTY
    articles = rng.random() < 0.5
    detail = str(rng.choice(("full", "bare", "mixed"), p=(0.5, 0.25, 0.25)))
    generic = str(rng.choice(vocabulary.GENERICS)) if rng.random() < 0.08 else ""
    phrases = [_phrase(look, articles, detail, generic, rng) for look in looks]
    order = [int(index) for index in rng.permutation(len(looks))]
    if len(order) > 1 and rng.random() < 1 / 3:
        order = order[: int(rng.integers(1, len(order)))]
    before = ["a", "photo", "of"] if rng.random() < 0.6 else []
    after = ["in" if rng.random() < 0.1 else "on"] if rng.random() < 0.7 else []
    if after and articles and rng.random() < 0.15:
        after.append("the")
    return _join(before, phrases, order, after, background, looks)


def _phrase(look: Look, articles: bool, detail: str, generic: str, rng: Generator) -> list[str]:
    shape, colour, pattern = look
    noun = generic or shape
    if not generic and rng.random() < 0.15:
        noun = str(rng.choice(vocabulary.GENERICS))
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
    return "an" if next_word[0] in "aeiou" else "a"


def _join(
    before: list[str],
    phrases: list[list[str]],
    order: Sequence[int],
    after: list[str],
    background: str,
    looks: Sequence[Look],
) -> Caption:
    words = list(before)
    nouns: list[int] = []
    for index in order:
        if nouns:
            words.append("and")
        words += phrases[index]
        nouns.append(len(words) - 1)
    clear = _clear([phrases[index] for index in order], looks)
    if not after:
        return Caption(tuple(words), tuple(nouns), tuple(order), clear, None)
    words += [*after, background]
    return Caption(tuple(words), tuple(nouns), tuple(order), clear, len(words) - 1)


def _clear(phrases: list[list[str]], looks: Sequence[Look]) -> tuple[bool, ...]:
    """Whether each phrase means the same object in every assignment that fits the words.

    So in `star and thing` the thing is not the star, though the word would fit it.
    """
    ways = [
        way
        for way in permutations(range(len(looks)), len(phrases))
        if all(_fits(phrase, looks[which]) for phrase, which in zip(phrases, way, strict=True))
    ]
    return tuple(len({way[row] for way in ways}) == 1 for row in range(len(phrases)))


def _fits(phrase: list[str], look: Look) -> bool:
    return all(word in look for word in phrase if word in _TELLING)
