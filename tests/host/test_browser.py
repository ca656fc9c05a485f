"""The pack in a real browser: workflows open cleanly, and what nodes say stays on them.

Needs Playwright's Python package (the extra `browser`) and a Chromium, such as Debian's.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from found import ROOT
from server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TEXT = "[data-testid=visual_concepts_text]"
OPEN = "workflow => window.app.loadGraphData(workflow)"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(server: Server, browser: Any) -> Iterator[Any]:
    """A page with the front end loaded; what it complains of is in `page.complaints`."""
    opened = browser.new_page(viewport={"width": 1600, "height": 1000})
    opened.complaints = []
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
    opened.goto(f"http://127.0.0.1:{server.port}/", timeout=120_000)
    opened.wait_for_function("() => window.app?.graph && window.LiteGraph", timeout=120_000)
    opened.wait_for_function(
        "() => Object.keys(window.LiteGraph.registered_node_types).includes('LearnConcepts')",
        timeout=120_000,
    )
    yield opened
    opened.close()


def run(page: Any, server: Server) -> None:
    """Queue what is open, as the Run button does, and wait for its end."""
    before = len(server.get("/history"))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    page.wait_for_function(
        "async before => Object.keys(await (await fetch('/history')).json()).length > before",
        arg=before,
        timeout=300_000,
    )


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_workflows_open_cleanly(page: Any, file: Path) -> None:
    """No alert, no error, no node that is not there, and no widget without its value."""
    workflow = json.loads(file.read_text())
    page.evaluate(OPEN, workflow)
    page.wait_for_function("n => window.app.graph.nodes.length === n", arg=len(workflow["nodes"]))
    assert page.evaluate("() => window.app.graph.nodes.filter(n => n.has_errors).length") == 0
    known = page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert {node["type"] for node in workflow["nodes"]} <= {*known, "Note", "MarkdownNote"}
    assert page.complaints == []


@pytest.mark.parametrize(("nodes", "scene"), [("canvas", 3), ("Nodes 2.0", 4)])
def test_what_a_node_says_stays_on_it(page: Any, server: Server, nodes: str, scene: int) -> None:
    """On the node when it has run, and again when the workflow is opened, with all its values."""
    page.evaluate(
        "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)",
        nodes == "Nodes 2.0",
    )
    workflow = json.loads((ROOT / "workflows" / "text_to_mask_refined.json").read_text())
    # Another scene each time: what is cached is not run again, and says nothing again.
    next(n for n in workflow["nodes"] if n["type"] == "ConceptDemoScene")["widgets_values"][0] = (
        scene
    )
    page.evaluate(OPEN, workflow)
    values = "() => window.app.graph.serialize().nodes.map(n => [n.id, n.widgets_values ?? []])"
    before = page.evaluate(values)
    run(page, server)
    page.wait_for_selector(TEXT, state="attached", timeout=60_000)
    said = page.locator(TEXT).all_text_contents()
    assert any("%" in text for text in said), said
    saved = page.evaluate("() => window.app.graph.serialize()")
    page.evaluate("() => window.app.graph.clear()")
    page.wait_for_function("() => window.app.graph.nodes.length === 0")
    page.evaluate(OPEN, saved)
    page.wait_for_selector(TEXT, state="attached", timeout=60_000)
    assert sorted(page.locator(TEXT).all_text_contents()) == sorted(said)
    after = {node: of[: len(old)] for (node, of), (_, old) in zip(
        page.evaluate(values), before, strict=True
    )}  # fmt: skip
    assert after == dict(map(tuple, before))
    assert page.complaints == []
