"""Every test here runs in each ComfyUI that is found."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "scripts")]
from browsing import SCREEN, answer, complain, go  # noqa: E402
from found import FOUND, MISSING, ROOT, python_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from server import Server  # noqa: E402
from shipped import FILES, api, models_of, upscaler  # noqa: E402
from templates.stand_ins import on_demo  # noqa: E402

CHROMIUM = ("chromium", "chromium-browser", "chrome")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that asks for `comfyui` runs on each version found."""
    if "comfyui" in metafunc.fixturenames:
        here = FOUND or [pytest.param(None, marks=pytest.mark.skip(reason=MISSING))]
        metafunc.parametrize(
            "comfyui", here, ids=lambda f: f.name if f else "none", scope="session"
        )


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, once for all files: Playwright works once at a time in a process."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(saved: Server, browser: Any) -> Iterator[Any]:
    """A page with the front end loaded; what it complains of is in `page.complaints`."""
    opened = browser.new_page(viewport=SCREEN)
    opened.complaints = []
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: answer(opened, dialog))
    opened.on("console", lambda said: complain(opened, said))
    saved.post("/settings/Comfy.TutorialCompleted", True)
    go(opened, saved)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server of each version."""
    python = python_of(comfyui)
    assert python is not None
    running = Server(comfyui, python, tmp_path_factory.mktemp(f"server_{comfyui.name}")).start()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def models(server: Server) -> Iterator[Server]:
    """A server with an empty file for every model that a workflow names, and a random upscaler that loads."""
    wanted = {(m["directory"], m["name"]) for file in FILES for m in models_of(file)}
    made = [server.base / "models" / folder / name for folder, name in wanted]
    for path in made:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in made:
        if path.parent.name == "upscale_models":
            save_file(upscaler(), path)
    (server.base / "input" / "example.png").write_bytes((ROOT / "docs" / "demo.png").read_bytes())
    yield server
    for path in made:
        path.unlink()


@pytest.fixture(scope="session")
def saved(models: Server) -> Server:
    """A server on which what the other workflows load has been learned and saved."""
    models.run(on_demo(api(models, "09")))
    condition = on_demo(api(models, "20"))
    models.run({n: of for n, of in condition.items() if of["class_type"] != "SaveImage"})
    return models
