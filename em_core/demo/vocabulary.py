"""The words of the demo world, and their pieces of the CLIP vocabulary.

A few trigger words are pieces besides; the model was never shown them, and their vectors are 0.

Every word is one piece of CLIP's byte-pair encoding. A tokenizer folder that holds the byte pieces
and the merges of these words alone gives them the ids that the whole vocabulary gives them.

    python -m em_core.demo.vocabulary FULL_CLIP_TOKENIZER_FOLDER OUTPUT_FOLDER
"""

import argparse
import itertools
import json
import os
from pathlib import Path

from ..exchange.triggers import RARE

START_ID = 49406
END_ID = 49407
START_PIECE = "<|startoftext|>"
END_PIECE = "<|endoftext|>"

SHAPES = ("star", "circle", "square", "triangle", "heart", "ring", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("grass", "sand", "brick", "sky", "snow", "water", "wood", "stone")
GENERICS = ("thing", "toy", "object", "item")
FUNCTION_WORDS = ("a", "an", "and", "in", "of", "on", "photo", "the")
TRIGGERS = RARE[:16]
WORDS = tuple(sorted((*SHAPES, *COLOURS, *PATTERNS, *BACKGROUNDS, *GENERICS, *FUNCTION_WORDS)))

Merge = tuple[str, str]


def read_merges(path: Path) -> list[Merge]:
    """Merges of a CLIP `merges.txt` in the order of their rank (its first line is a header)."""
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    return [(left, right) for left, right in (line.split() for line in lines if line.strip())]


def merge_path(word: str, ranks: dict[Merge, int]) -> list[Merge]:
    """The merges that byte-pair encoding applies to `word`, first to last (Sennrich 2016, 3.2)."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    used = []
    while len(pieces) > 1:
        pairs = [pair for pair in itertools.pairwise(pieces) if pair in ranks]
        if not pairs:
            break
        best = min(pairs, key=ranks.__getitem__)
        used.append(best)
        pieces = _apply(best, pieces)
    if pieces != [word + "</w>"]:
        raise ValueError(f"Expected {word!r} to be one piece of the vocabulary, got {pieces}.")
    return used


def _apply(merge: Merge, pieces: list[str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(pieces):
        if tuple(pieces[position : position + 2]) == merge:
            merged.append(merge[0] + merge[1])
            position += 2
        else:
            merged.append(pieces[position])
            position += 1
    return merged


def extract(source: Path, words: tuple[str, ...] = WORDS) -> tuple[dict[str, int], list[Merge]]:
    """Vocabulary (piece -> true id) and merges (in rank order) that `words` need.

    `source` is a folder with the whole CLIP `vocab.json` and `merges.txt`. Raises ValueError when
    a word is not a single piece.
    """
    vocabulary = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    ranks = {merge: rank for rank, merge in enumerate(read_merges(source / "merges.txt"))}
    merges = {merge for word in words for merge in merge_path(word, ranks)}
    pieces = {piece for piece, number in vocabulary.items() if number < 512}
    pieces |= {left + right for left, right in merges} | {START_PIECE, END_PIECE}
    table = {piece: vocabulary[piece] for piece in sorted(pieces, key=vocabulary.__getitem__)}
    return table, sorted(merges, key=ranks.__getitem__)


def write_tokenizer(source: Path, folder: Path) -> None:
    """Write the reduced tokenizer of the demo words and triggers, as `transformers.CLIPTokenizer` reads it."""
    table, merges = extract(source, (*WORDS, *TRIGGERS))
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    write_text(folder / "vocab.json", json.dumps(table, ensure_ascii=False, separators=(",", ":")))
    write_text(folder / "merges.txt", "\n".join(lines))
    write_text(folder / "tokenizer_config.json", json.dumps(_CONFIG, indent=2) + "\n")
    write_text(folder / "special_tokens_map.json", json.dumps(_SPECIAL, indent=2) + "\n")


def read_ids(tokenizer: Path) -> dict[str, int]:
    """Piece -> id of a tokenizer folder."""
    return json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text aside, then rename it into place."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)


_SPECIAL = {
    "bos_token": START_PIECE,
    "eos_token": END_PIECE,
    "pad_token": END_PIECE,
    "unk_token": END_PIECE,
}
_CONFIG = {
    **_SPECIAL,
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
}


def main() -> None:
    """Extract the demo tokenizer from a whole CLIP tokenizer folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path, help="folder with the whole vocab.json, merges.txt")
    parser.add_argument("folder", type=Path, help="folder to write the reduced tokenizer to")
    arguments = parser.parse_args()
    write_tokenizer(arguments.source, arguments.folder)


if __name__ == "__main__":
    main()
