"""Help pages and translations reach the front end, and the English ones say what the schema says."""

import json

import pytest
from described import ENGLISH, ours, words
from server import ROOT, Server

LANGUAGES = ("en", "zh", "ja")


def test_english_is_the_schema(server: Server) -> None:
    """After a change of a node: `python tests/host/write_words.py`."""
    assert json.loads(ENGLISH.read_text(encoding="utf-8")) == words(ours(server))


@pytest.mark.parametrize("language", LANGUAGES)
def test_served(server: Server, language: str) -> None:
    translations = server.get("/i18n")[language]
    for file in (ROOT / "locales" / language).glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        found = translations if file.stem == "main" else translations[file.stem]
        assert content.items() <= found.items()
    for node in ours(server):
        for page in (f"{node}/{language}.md", f"{node}.md"):
            text = server.text(f"/extensions/visual-concepts/docs/{page}")
            assert text == (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
