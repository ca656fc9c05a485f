"""Make the bundled workflows' thumbnails from what they show when they run.

    python tests/host/write_thumbnails.py --port 8188 --base ~/comfy/ComfyUI [--only 07]

A ComfyUI with this pack and the tests' helper nodes (tests/host/helpers) runs there; `base` is where its folders
are. The workflows for checkpoints run on the demo model.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from found import ROOT
from PIL import Image, ImageDraw, ImageFont
from server import Graph, Server
from templates.stand_ins import on_demo, shortened
from workflow_ui import to_api

SIDE, MARGIN = 256, 6
DRAWN_BY = "Example drawn with the demo model"
SHOWN = ("MaskPreview", "PreviewImage", "SaveImage")
LEARNING = 120


class Running(Server):
    """A server that somebody else has started."""

    def __init__(self, port: int, base: Path) -> None:
        self.port, self.base, self.process = port, base, None

    def wait(self, prompt_id: str, timeout: float = 900) -> dict[str, Any]:
        """The history entry of a finished prompt."""
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            time.sleep(0.3)
        return dict(history[prompt_id])

    def picture(self, of: dict[str, str]) -> Image.Image:
        """A picture that a node has shown."""
        url = f"http://127.0.0.1:{self.port}/view?{urllib.parse.urlencode(of)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")


def is_demo(graph: Graph) -> bool:
    """Whether a workflow is for the demo model."""
    return any(of["class_type"] == "ConceptDemoScene" for of in graph.values())


def prepared(workflow: dict[str, Any], info: dict[str, Any]) -> Graph:
    """The graph to run, with a preview of every scene before all else."""
    graph = to_api(workflow, info)
    if is_demo(graph):
        graph = shortened(graph, 20, LEARNING)
    else:
        graph = on_demo(graph, 12, LEARNING // 2)
    for node in graph.values():
        # An upscale model of random weights draws nothing.
        if node["class_type"] == "ImageUpscaleWithModel":
            kept = {"upscale_method": "lanczos", "scale_by": 4.0, "image": node["inputs"]["image"]}
            node.update({"class_type": "ImageScaleBy", "inputs": kept})
    scenes = [name for name, of in graph.items() if of["class_type"] == "ConceptDemoScene"]
    seen = {
        f"scene{name}": {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
        for name in scenes
    }
    return seen | graph


def chosen(
    workflow: dict[str, Any], graph: Graph, outputs: dict[str, Any]
) -> list[list[dict[str, str]]]:
    """The pictures of up to four tiles: the scenes first, what is drawn last, what is found between them."""
    titles = {str(node["id"]): node.get("title", "") for node in workflow["nodes"]}
    order = [
        n for n in graph if graph[n]["class_type"] in SHOWN and outputs.get(n, {}).get("images")
    ]
    scenes = [n for n in order if n.startswith("scene")]
    drawn = [n for n in order if graph[n]["class_type"] == "SaveImage"]
    left_out = ("picture", "Both", "before", "Loss")
    between = [
        n for n in order if n not in scenes + drawn and not any(w in titles[n] for w in left_out)
    ]
    between = [n for n in between if "Curves" not in titles[n] or not drawn]
    names = [*scenes, *between[: max(0, 4 - len(scenes) - len(drawn))], *drawn][:4]
    tiles = [outputs[name]["images"] for name in names]
    last = tiles.pop() if len(tiles) < 4 else []
    # Several pictures that were drawn fill what is left of the square by themselves.
    apart = [[each] for each in last[: 4 - len(tiles)]]
    return tiles + (apart if len(tiles) + len(apart) in (2, 4) else [last] if last else [])


def tile(pictures: list[Image.Image]) -> Image.Image:
    """One square of up to four pictures, two of them in its middle; small ones are enlarged without blur."""
    count = 1 if len(pictures) == 1 else 2
    side = SIDE // count
    canvas = Image.new("RGB", (SIDE, SIDE), "black")
    above = side // 2 if len(pictures) == 2 else 0
    for index, picture in enumerate(pictures[: count**2]):
        scale = min(side / picture.width, side / picture.height)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        place = index % count * side, index // count * side + above
        middle = place[0] + (side - size[0]) // 2, place[1] + (side - size[1]) // 2
        canvas.paste(picture.resize(size, way), middle)
    return canvas


def sheet(tiles: list[Image.Image]) -> Image.Image:
    """One tile large; two side by side; three with the last one large beside them; four in a square."""
    step, large = SIDE + MARGIN, 2 * SIDE + MARGIN
    if len(tiles) == 1:
        return tiles[0].resize((large, large), Image.Resampling.LANCZOS)
    if len(tiles) == 3:
        tiles[2] = tiles[2].resize((large, large), Image.Resampling.LANCZOS)
    across = {2: [(0, 0), (1, 0)], 3: [(0, 0), (0, 1), (1, 0)]}
    places = across.get(len(tiles), [(0, 0), (1, 0), (0, 1), (1, 1)])
    width = max(x * step + tile.width for (x, _), tile in zip(places, tiles, strict=True))
    height = max(y * step + tile.height for (_, y), tile in zip(places, tiles, strict=True))
    canvas = Image.new("RGB", (width, height), "white")
    for (x, y), each in zip(places, tiles, strict=True):
        canvas.paste(each, (x * step, y * step))
    return canvas


def labelled(picture: Image.Image) -> Image.Image:
    """The picture above a line that says what drew it: a checkpoint's template shows no photograph."""
    label = picture.width // 11
    canvas = Image.new("RGB", (picture.width, picture.height + label), "black")
    canvas.paste(picture)
    middle = picture.width / 2, picture.height + label / 2
    text = ImageFont.load_default(0.6 * label)
    ImageDraw.Draw(canvas).text(middle, DRAWN_BY, "white", text, anchor="mm")
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--only", default="", help="numbers with commas")
    args = parser.parse_args()
    server = Running(args.port, args.base)
    info = server.get("/object_info")
    for file in sorted((ROOT / "workflows").glob("*.json")):
        if args.only and file.name[:2] not in args.only.split(","):
            continue
        workflow = json.loads(file.read_text(encoding="utf-8"))
        graph = prepared(workflow, info)
        outputs = server.run(graph)
        tiles = [
            tile([server.picture(of) for of in pictures])
            for pictures in chosen(workflow, graph, outputs)
        ]
        picture = sheet(tiles)
        if not is_demo(to_api(workflow, info)):
            picture = labelled(picture)
        picture.save(file.with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main()
