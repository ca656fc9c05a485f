"""The pack in a real browser: workflows open cleanly and run, and what nodes say stays on them.

Needs Playwright's Python package (the extra `browser`) and a Chromium, such as Debian's. With
COMFYUI_FRONTENDS (see found.py) each ComfyUI is tried with its own front end.
"""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import ROOT, Server
from shipped import FILES, NEEDED, is_new_enough, read

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
DEMO = [file for file in FILES if file.name[:2] <= "08"]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
CANVASES = ("canvas", "Nodes 2.0")
TEXT = "[data-testid=visual_concepts_text]"
OPEN = "workflow => window.app.loadGraphData(workflow)"
SCREEN = {"width": 1920, "height": 1080}
NOT_OURS = (
    "Failed to load resource", "core workflow templates", "ERR_NAME_NOT_RESOLVED",
    "graph accessed before initialization",
)  # fmt: skip
"""What the front end says where it has no network, no templates of ComfyUI's own, and is asked early."""
OVERLAPS = """() => {
  const boxes = window.app.graph.nodes.map(n => [n.title, ...n.getBounding()])
  const apart = (a, b) => a[1] + a[3] <= b[1] + 1 || a[2] + a[4] <= b[2] + 1
  return boxes.flatMap((a, i) => boxes.slice(i + 1)
    .filter(b => !apart(a, b) && !apart(b, a)).map(b => `${a[0]} / ${b[0]}`))
}"""
PICTURES = """() => [...document.querySelectorAll('img')]
  .filter(i => i.naturalWidth >= 500).map(i => i.alt)"""
RUN = "button[data-testid=queue-button], [data-testid=queue-button] button"
FAULTY = "() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.title)"


@pytest.fixture
def page(saved: Server, browser: Any) -> Iterator[Any]:
    """A page with the front end loaded; what it complains of is in `page.complaints`."""
    opened = browser.new_page(viewport=SCREEN)
    opened.complaints = []
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
    opened.on("console", lambda said: complain(opened, said))
    saved.post("/settings/Comfy.TutorialCompleted", True)
    opened.goto(f"http://127.0.0.1:{saved.port}/", timeout=120_000)
    opened.wait_for_function("() => window.app?.graph && window.LiteGraph", timeout=120_000)
    opened.wait_for_function(
        "() => Object.keys(window.LiteGraph.registered_node_types).includes('LearnConcepts')",
        timeout=120_000,
    )
    yield opened
    opened.close()


def complain(page: Any, said: Any) -> None:
    """Keep an error of the console, unless it is known to have nothing to do with the pack."""
    if said.type == "error" and not any(known in said.text for known in NOT_OURS):
        page.complaints.append(said.text)


def choose(page: Any, server: Server, nodes: str) -> None:
    """Choose how nodes are drawn; v0.8.0's front end has the canvas alone."""
    if nodes != "canvas" and not is_new_enough(server, (0, 33)):
        pytest.skip("Nodes 2.0 is tried in the newest front end")
    setting = "on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    page.evaluate(setting, nodes != "canvas")


def opened(page: Any, file: Path) -> None:
    """Open a workflow, with all its nodes, none of them unknown."""
    workflow = read(file)
    page.evaluate(OPEN, workflow)
    page.wait_for_function("n => window.app.graph.nodes.length === n", arg=len(workflow["nodes"]))
    page.wait_for_timeout(300)
    known = page.evaluate("() => Object.keys(window.LiteGraph.registered_node_types)")
    assert {node["type"] for node in workflow["nodes"]} <= {*known, "Note", "MarkdownNote"}, file


def run(page: Any, server: Server) -> dict[str, Any]:
    """Press the Run button, and wait for the end of what it queued."""
    before = set(server.get("/history"))
    page.locator(RUN).first.click()
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        ended = server.get("/history")
        for name in set(ended) - before:
            return dict(ended[name])
        page.wait_for_timeout(300)
    raise TimeoutError(f"Not finished:\n{server.log_text()[-2000:]}")


@pytest.mark.parametrize("nodes", CANVASES)
def test_workflows_open_cleanly(page: Any, saved: Server, nodes: str) -> None:
    """No alert, no error, no node that is not there, none marked red, none over another."""
    choose(page, saved, nodes)
    wrong = {}
    for file in FILES:
        needed = NEEDED.search(file.stem)
        if needed and not is_new_enough(saved, tuple(map(int, needed.groups()))):
            continue
        opened(page, file)
        found = [*page.evaluate(FAULTY), *page.evaluate(OVERLAPS), *page.complaints]
        page.complaints.clear()
        if found:
            wrong[file.stem] = found
    assert wrong == {}


def test_template_browser(page: Any, saved: Server) -> None:
    """Every workflow is listed by its name with its picture, and a click opens it."""
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("visual-concepts", exact=True).first.click()
    deadline = time.monotonic() + 120
    seen: set[str] = set()
    # Pictures are loaded when they come into view, so down and up again until all have been seen.
    steps = itertools.cycle([300] * 10 + [-300] * 10)
    wanted = {file.stem for file in FILES}
    while not wanted <= seen and time.monotonic() < deadline:
        seen |= set(page.evaluate(PICTURES))
        page.mouse.move(960, 600)
        page.mouse.wheel(0, next(steps))
        page.wait_for_timeout(500)
    assert wanted <= seen
    page.mouse.wheel(0, -20_000)
    page.wait_for_timeout(500)
    page.get_by_text(FILES[0].stem).first.click()
    page.wait_for_function(
        "n => window.app.graph.nodes.length === n", arg=len(read(FILES[0])["nodes"]), timeout=30_000
    )
    assert page.complaints == []


def test_blueprints(page: Any, saved: Server) -> None:
    """Each is registered as a node; put on the canvas it has its sockets and the widgets it shows."""
    listed = {of["name"] for of in saved.get("/global_subgraphs").values()}
    assert {file.stem for file in BLUEPRINTS} <= listed
    for file in BLUEPRINTS:
        blueprint = read(file)
        page.evaluate(OPEN, blueprint)
        page.wait_for_function("() => window.app.graph.nodes.length === 1")
        page.wait_for_timeout(300)
        (node,) = blueprint["nodes"]
        sockets = "() => window.app.graph.nodes[0].{}.filter(s => !s.widget).map(s => s.name)"
        for way in ("inputs", "outputs"):
            assert page.evaluate(sockets.format(way)) == [each["name"] for each in node[way]]
        widgets = page.evaluate("() => window.app.graph.nodes[0].widgets.length")
        assert widgets >= len(node["properties"]["proxyWidgets"])
        assert page.evaluate(FAULTY) == []
    assert page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("nodes", CANVASES)
@pytest.mark.parametrize("file", DEMO, ids=lambda f: f.stem)
def test_demo_runs_by_the_button(page: Any, saved: Server, file: Path, nodes: str) -> None:
    """As it is, to the end; afterwards no node is red, and none has grown over another."""
    choose(page, saved, nodes)
    opened(page, file)
    ended = run(page, saved)
    assert ended["status"]["status_str"] == "success", ended["status"]["messages"][-1]
    page.wait_for_timeout(1500)
    assert page.evaluate(FAULTY) == []
    assert page.evaluate(OVERLAPS) == []
    assert page.complaints == []


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
