"""The pack in a real browser: workflows open cleanly, are listed with pictures, and run.

Needs Playwright's Python package (the extra `browser`) and a Chromium, such as Debian's. With
COMFYUI_FRONTENDS (see found.py) each ComfyUI is tried with its own front end.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from browsing import CANVASES, FAULTY, OPEN, OVERLAPS, choose, opened, run
from server import ROOT, Server
from shipped import FILES, NEEDED, is_new_enough, read

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
DEMO = [file for file in FILES if file.name[:2] <= "08"]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
PICTURES = """() => [...document.querySelectorAll('img')]
  .filter(i => i.naturalWidth >= 500).map(i => i.alt)"""


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
    """Every workflow is listed in its order by its name with its picture, and a click opens it."""
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("visual-concepts", exact=True).first.click()
    page.wait_for_function(f"() => ({PICTURES})().length >= 4", timeout=60_000)
    first = page.evaluate(PICTURES)
    assert first == sorted(first)
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


@pytest.mark.parametrize("nodes", CANVASES)
@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=() if f.name[:2] == "04" else pytest.mark.slow) for f in DEMO],
    ids=lambda f: f.stem,
)
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
