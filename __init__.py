"""Visual Concepts: a ComfyUI node pack. ComfyUI asks for the nodes through `comfy_entrypoint`."""

WEB_DIRECTORY = "web"


async def comfy_entrypoint():  # type: ignore[no-untyped-def]
    """The extension that ComfyUI registers."""
    from .nodes import VisualConcepts

    return VisualConcepts()
