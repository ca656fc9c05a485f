"""What a user should know while a node runs, told on the node and not in the log alone."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from comfy.utils import ProgressBar
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..em_core.errors import Notice
from .pictures import to_images


@contextmanager
def told_on_node() -> Iterator[list[str]]:
    """Show the core's notices on the node that is running, each at once and all of them together.

    Yields the list that they are gathered in.
    """
    told: list[str] = []

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, Notice):
            return before(message, category, *place, **more)
        logging.warning(str(message))
        told.append(str(message))
        show_on_node("\n".join(told))

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = show
        yield told


def running_server() -> Any:
    """Return ComfyUI's server, or None where its nodes are used without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_on_node(text: str, node: str | None = None) -> None:
    """Write a text on a node, or on the running one, if there is a server that runs one."""
    server, running = running_server(), get_executing_context()
    node = node or (running.node_id if running else None)
    if server is not None and node is not None:
        server.send_progress_text(text, node)


def show_picture(picture: Image.Image) -> None:
    """Show a picture on the running node as its last preview, which the front end keeps there.

    A node that has had previews does not show the pictures in its `ui`, or shows the preview twice.
    """
    ProgressBar(1).update_absolute(1, 1, ("JPEG", picture, max(picture.size)))


def on_node(
    *lines: str, pictures: Sequence[Image.Image] = (), last_preview: Image.Image | None = None
) -> dict[str, list[Any]]:
    """What a node's `ui` holds so that these lines stay on it (see web/js/text_on_nodes.js), and pictures.

    Pictures go to ComfyUI's folder of temporary files, as those of its Preview Image do. The last preview
    is on the node already (see :func:`show_picture`); it is there again when the page has been reloaded.
    """
    said: dict[str, list[Any]] = {"text": ["\n".join(line for line in lines if line)]}
    if pictures:
        said["images"] = [saved for picture in pictures for saved in saved_for_now(picture)]
    if last_preview is not None:
        said["picture"] = saved_for_now(last_preview)
    return said


def saved_for_now(picture: Image.Image) -> list[Any]:
    """Save a picture as Preview Image does; return where, as the front end wants it."""
    return list(ui.PreviewImage(to_images([picture])).values)
