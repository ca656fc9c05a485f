"""What the browser tests do with ComfyUI's editor."""

import time
from pathlib import Path
from typing import Any

import pytest
from server import Server
from shipped import is_new_enough, read

CANVASES = ("canvas", "Nodes 2.0")
SCREEN = {"width": 1920, "height": 1080}
TEXT = "[data-testid=visual_concepts_text]"
OPEN = "workflow => window.app.loadGraphData(workflow)"
RUN = "button[data-testid=queue-button], [data-testid=queue-button] button"
CANCEL = "button[aria-label='Cancel current run']"
NOT_OURS = (
    "Failed to load resource", "core workflow templates", "ERR_NAME_NOT_RESOLVED",
    "graph accessed before initialization",
)  # fmt: skip
"""What the front end says where it has no network, no templates of ComfyUI's own, and is asked early."""
OVERLAPS = """() => {
  const scale = window.app.canvas.ds.scale
  const drawn = node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`)
    if (!window.LiteGraph.vueNodesMode || !element) return [...node.getBounding()]
    const of = element.getBoundingClientRect()
    return [of.left, of.top, of.width, of.height].map(each => each / scale)
  }
  const boxes = window.app.graph.nodes.map(n => [n.title, ...drawn(n)])
  const apart = (a, b) => a[1] + a[3] <= b[1] + 1 || a[2] + a[4] <= b[2] + 1
  return boxes.flatMap((a, i) => boxes.slice(i + 1)
    .filter(b => !apart(a, b) && !apart(b, a)).map(b => `${a[0]} / ${b[0]}`))
}"""
"""Titles of nodes that lie over one another, as they are drawn: in Nodes 2.0 they are elements of the page."""
FAULTY = "() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.title)"
WITH_PROMPT = """text => {
  const node = window.app.graph.nodes.find(n => n.type === 'ConceptExample')
  const slot = node.inputs.findIndex(i => i.name === 'prompt')
  if (node.inputs[slot].link != null) node.disconnectInput(slot)
  node.widgets.find(w => w.name === 'prompt').value = text
}"""
"""Give Concept Example a prompt of its own."""
WITH_VALUES = """([kind, values]) => {
  for (const node of window.app.graph.nodes.filter(n => n.type === kind))
    for (const [name, value] of Object.entries(values))
      node.widgets.find(w => w.name === name).value = value
}"""
"""Set widgets of the nodes of a kind."""


def complain(page: Any, said: Any) -> None:
    """Keep an error of the console, unless it is known to have nothing to do with the pack."""
    if said.type == "error" and not any(known in said.text for known in NOT_OURS):
        page.complaints.append(said.text)


def answer(page: Any, dialog: Any) -> None:
    """Let a page be left with work that is not saved, and keep what any other dialog says."""
    if dialog.type == "beforeunload":
        dialog.accept()
    else:
        page.complaints.append(dialog.message)
        dialog.dismiss()


def go(page: Any, server: Server) -> None:
    """Open the editor, or open it again."""
    page.goto(f"http://127.0.0.1:{server.port}/", timeout=120_000)
    page.wait_for_function("() => window.app?.graph && window.LiteGraph", timeout=120_000)
    page.wait_for_function(
        "() => Object.keys(window.LiteGraph.registered_node_types).includes('LearnConcepts')",
        timeout=120_000,
    )


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


def press(page: Any, button: str) -> None:
    """Press a button at once: a click by the mouse waits until the page is drawn without a pause."""
    page.locator(button).first.evaluate("of => of.click()")


def run(page: Any, server: Server) -> dict[str, Any]:
    """Press the Run button, and wait for the end of what it queued."""
    before = set(server.get("/history"))
    press(page, RUN)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        ended = server.get("/history")
        for name in set(ended) - before:
            return dict(ended[name])
        page.wait_for_timeout(300)
    raise TimeoutError(f"Not finished:\n{server.log_text()[-2000:]}")
