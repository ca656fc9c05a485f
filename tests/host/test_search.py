"""Who looks for a node by a plain word finds the right one: by the front end's own ranking."""

from typing import Any

import pytest
from server import Server

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
LEARN, EXTRACT = "LearnConcepts", "ExtractLatentMasks"
BY_NAME = {
    "segment": (EXTRACT, 5),
    "train": (LEARN, 20),
    "lora": (LEARN, 20),
    "mask": ("ConceptMaskByName", 20),
}
"""Word -> the right node, and its last place that counts; found by the names of nodes."""
BY_ALIAS = {
    word: (LEARN, 5)
    for word in ("visual concepts", "dreambooth", "textual inversion", "character", "subject")
}
"""The same by search words, which ComfyUI v0.8.0 does not know."""
SEARCH = """words => {
  const app = document.querySelector("#vue-app")?.__vue_app__
  const service = app?.config.globalProperties.$pinia?._s.get("nodeDef")?.nodeSearchService
  const found = word => service?.searchNode(word, [], { limit: 64 }) ?? []
  return words.map(word => found(word).map(node => node.name))
}"""


def searched(server: Server, browser: Any, words: list[str]) -> Any:
    """The nodes that the search box lists for each word, first one first."""
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/", timeout=120_000)
    page.wait_for_function(f"() => ({SEARCH})(['{LEARN}'])[0].includes('{LEARN}')", timeout=120_000)
    found = page.evaluate(SEARCH, words)
    page.close()
    return found


def test_plain_words_find_the_right_node(server: Server, browser: Any) -> None:
    knows = server.get(f"/object_info/{LEARN}")[LEARN].get("search_aliases")
    wanted = {**BY_NAME, **(BY_ALIAS if knows else {})}
    for word, names in zip(wanted, searched(server, browser, list(wanted)), strict=True):
        node, place = wanted[word]
        assert node in names[:place], f"{word}: {names[:place]}"
