"""Every node has a help page and a complete locale in every language of the pack."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
NODES: dict[str, Any] = json.loads((ROOT / "tests/host/schema.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh", "ja")
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
BULLET = re.compile(r"^ *- (.+?)[:\uff1a]", re.MULTILINE)
LABEL = re.compile(r"\*\*(.+?)\*\*")
EAST_ASIAN = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


def page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text(encoding="utf-8")


def locale(language: str, file: str = "nodeDefs") -> Any:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def shape(words: Any) -> Any:
    """The keys of a locale, in order, without its texts."""
    if isinstance(words, dict):
        return [(key, shape(value)) for key, value in words.items()]
    return ""


def texts(words: Any) -> list[str]:
    """All texts of a locale."""
    return [t for w in words.values() for t in texts(w)] if isinstance(words, dict) else [words]


def test_no_page_is_without_a_node() -> None:
    folders = {path.name for path in DOCS.iterdir() if path.is_dir()}
    assert folders == {path.stem for path in DOCS.glob("*.md")} == set(NODES)


@pytest.mark.parametrize("node", NODES)
def test_pages(node: str) -> None:
    """The front end asks for the user's language, then for the page without one, never for English."""
    assert (DOCS / f"{node}.md").read_text(encoding="utf-8") == page(node, "en")
    for language in LANGUAGES:
        text = page(node, language)
        assert len(HEADING.findall(text)) == len(HEADING.findall(page(node, "en"))) == 3, language
        assert not re.search(r"[<>]", CODE.sub("", text)), f"{language}: a <mark> outside of `code`"
        assert CODE.sub("", text).count("`") == 0, f"{language}: a ` that is not closed"
        assert text.count("**") % 2 == 0, language
        assert bool(EAST_ASIAN.search(text)) == (language != "en"), language


@pytest.mark.parametrize("language", LANGUAGES)
def test_pages_call_inputs_as_the_nodes_do(language: str) -> None:
    for node, words in locale(language).items():
        inputs = page(node, language).split("\n## ")[1]
        labels = [label for head in BULLET.findall(inputs) for label in LABEL.findall(head)]
        names = [of["name"] for of in words["inputs"].values()]
        for label in labels:
            assert any(name.startswith(label) for name in names), f"{node}: {label} of {names}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_locales_have_the_schema(language: str) -> None:
    words = locale(language)
    assert list(words) == list(NODES)
    for node, of in NODES.items():
        assert list(words[node]["inputs"]) == [key for _, key, _ in of["inputs"]], node
        assert list(words[node]["outputs"]) == [str(n) for n in range(len(of["outputs"]))], node
    assert shape(words) == shape(locale("en"))
    assert shape(locale(language, "main")) == shape(locale("en", "main"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_locales_are_complete(language: str) -> None:
    """The front end reads braces, bars and at signs as instructions."""
    words = locale(language)
    for text in [*texts(words), *texts(locale(language, "main"))]:
        assert text.strip() and not re.search(r"[{}|@]", text), text
    for node, of in words.items():
        said = [of["description"], *(v["tooltip"] for v in (*of["inputs"].values(),))]
        said += [v["tooltip"] for v in of["outputs"].values()]
        for text in said:
            assert bool(EAST_ASIAN.search(text)) == (language != "en"), f"{node}: {text}"
