"""What nodes say in a real browser: it stays on them, and so do errors; and a run that is cancelled.

As test_browser.py, it needs the extra `browser` and a Chromium.
"""

import json
import time
from typing import Any

import pytest
from browsing import (
    CANCEL,
    CANVASES,
    OPEN,
    OVERLAPS,
    RUN,
    TEXT,
    WITH_PROMPT,
    WITH_VALUES,
    choose,
    go,
    opened,
    press,
    run,
)  # fmt: skip
from server import Server
from shipped import FILES, read

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
LAYOUT = next(file for file in FILES if file.name.startswith("05"))
CUT = """of => [...document.querySelectorAll(of)]
  .filter(e => e.scrollHeight > e.clientHeight + 2).map(e => e.textContent)"""
"""Texts that have to be scrolled to be read."""
FORMER = """text => {
  const node = window.app.graph.nodes.find(n => n.type === 'ConceptExample')
  node.properties.visual_concepts_text = text
  node.onConfigure({})
}"""


@pytest.mark.parametrize(("nodes", "scene"), [("canvas", 3), ("Nodes 2.0", 4)])
def test_what_a_node_says_stays_on_it(page: Any, saved: Server, nodes: str, scene: int) -> None:
    """On the node when it has run, and again when the workflow is opened, with all its values."""
    choose(page, saved, nodes)
    workflow = read(next(file for file in FILES if file.name.startswith("03")))
    # Another scene each time: what is cached is not run again, and says nothing again.
    shown = next(n for n in workflow["nodes"] if n["type"] == "ConceptDemoScene")
    shown["widgets_values"][0] = scene
    page.evaluate(OPEN, workflow)
    # Preview as Text keeps what it shows, so its values are not the same before and after.
    values = """() => window.app.graph.serialize().nodes
      .filter(n => n.type !== "PreviewAny").map(n => [n.id, n.widgets_values ?? []])"""
    before = page.evaluate(values)
    run(page, saved)
    page.wait_for_selector(TEXT, state="attached", timeout=60_000)
    said = page.locator(TEXT).all_text_contents()
    assert any("%" in text for text in said), said
    page.wait_for_timeout(500)
    assert page.evaluate(CUT, TEXT) == []
    assert page.evaluate(OVERLAPS) == []
    kept = page.evaluate("() => window.app.graph.serialize()")
    page.evaluate("() => window.app.graph.clear()")
    page.wait_for_function("() => window.app.graph.nodes.length === 0")
    page.evaluate(OPEN, json.loads(json.dumps(kept)))
    page.wait_for_selector(TEXT, state="attached", timeout=60_000)
    assert sorted(page.locator(TEXT).all_text_contents()) == sorted(said)
    after = {node: of[: len(old)] for (node, of), (_, old) in zip(
        page.evaluate(values), before, strict=True
    )}  # fmt: skip
    assert after == dict(map(tuple, before))
    assert page.complaints == []


def texts(page: Any) -> list[str]:
    return list(page.locator(TEXT).all_text_contents())


def wait_for_text(page: Any, words: str) -> None:
    """Until a node says these words."""
    page.wait_for_function(
        "([of, words]) => [...document.querySelectorAll(of)].some(e => e.textContent.includes(words))",
        arg=[TEXT, words],
        timeout=120_000,
    )


def stop(server: Server) -> None:
    """Interrupt what runs, and wait until nothing does."""
    server.post("/interrupt", {})
    deadline = time.monotonic() + 60
    while server.get("/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.2)


@pytest.mark.parametrize("nodes", CANVASES)
def test_why_a_prompt_is_refused(page: Any, saved: Server, nodes: str) -> None:
    """The node says it, in place of what it said before, until the next run."""
    choose(page, saved, nodes)
    opened(page, LAYOUT)
    page.evaluate(FORMER, "Said before.")
    wait_for_text(page, "Said before.")
    page.evaluate(WITH_PROMPT, "a photo of a square")
    press(page, RUN)
    wait_for_text(page, "No concept in the prompt 'a photo of a square'. Mark what to learn")
    assert not any("Said before." in text for text in texts(page))
    assert saved.get("/queue")["queue_running"] == []
    page.keyboard.press("Escape")
    page.evaluate(WITH_PROMPT, "a photo of <rex:square> and <doll:circle>")
    press(page, RUN)
    page.wait_for_function(
        "of => [...document.querySelectorAll(of)].every(e => !e.textContent.includes('No concept'))",
        arg=TEXT,
    )
    stop(saved)


def test_where_masks_go(page: Any, saved: Server) -> None:
    """'given' without masks: the node that fails names the input and the node of the masks."""
    opened(page, LAYOUT)
    page.evaluate(WITH_VALUES, ["LearnConcepts", {"mode": "given", "seed": 1234}])
    run(page, saved)
    wait_for_text(page, "Connect masks to the input 'masks' of its Concept Example")


def test_a_picture_after_a_reload(page: Any, saved: Server) -> None:
    """Text and picture of a finished node are there again when the page has been reloaded."""
    opened(page, LAYOUT)
    page.evaluate(WITH_VALUES, ["LearnConcepts", {"steps": 2, "joint": "nothing", "seed": 4321}])
    page.evaluate(WITH_VALUES, ["KSampler", {"steps": 1}])
    run(page, saved)
    wait_for_text(page, "Masks: rex")
    page.wait_for_timeout(3000)  # the editor keeps its draft of the workflow with a delay
    go(page, saved)
    wait_for_text(page, "Masks: rex")
    page.wait_for_function(f"() => document.querySelector('{TEXT} img')?.naturalWidth > 100")


def test_cancel_and_go_on(page: Any, saved: Server) -> None:
    """The Cancel button stops a run at once; queued again, it goes on from where it was."""
    opened(page, LAYOUT)
    page.evaluate(WITH_VALUES, ["LearnConcepts", {"steps": 3000, "joint": "nothing", "seed": 99}])
    steps: list[int] = []
    page.expose_function("keep_step", lambda step: steps.append(step))
    page.evaluate(
        "() => window.app.api.addEventListener('progress', e => e.detail.max === 3000 && keep_step(e.detail.value))"
    )
    press(page, RUN)
    deadline = time.monotonic() + 240
    while max(steps, default=0) < 5 and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    (queued,) = [job[1] for job in saved.get("/queue")["queue_running"]]
    with page.expect_response(lambda answer: "/interrupt" in answer.url, timeout=60_000):
        press(page, CANCEL)
    asked = time.time()
    messages = dict(saved.wait(queued, 60)["status"]["messages"])
    assert messages["execution_interrupted"]["timestamp"] / 1000 - asked < 2
    page.wait_for_timeout(500)
    reached = max(steps)
    steps.clear()
    press(page, RUN)
    while not steps and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    stop(saved)
    assert steps[0] >= reached
