"""The node that measures pictures, against core's own nodes, and its report."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Parts, learning
from PIL import Image
from server import Builder, Failed, Node, Server

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from tiny_encoders import save_clip

PROMPTS = "a photo of <rex> on sand\n# not drawn\na photo of <doll> on grass"


def vision(b: Builder, kind: str) -> Node:
    return b.add("TestClipVision", kind=kind, seed=4)


def evaluating(**changes: Any) -> tuple[Parts, Node]:
    """Concepts that were learned in a few steps, under given masks, and the node that measures them."""
    p = learning(mode="given", steps=2)
    inputs: dict[str, Any] = {
        "model": p.model, "clip": p.model[1], "vae": p.model[2], "concepts": p.learn, "examples": p.examples,
        "prompts": PROMPTS, "count": 2, "seed": 5, "steps": 4, "cfg": 3.0, "passes": 2,
        "clip_vision": vision(p.b, "clip"), "dino": vision(p.b, "dino"),
    }  # fmt: skip
    given = {name: value for name, value in (inputs | changes).items() if value is not None}
    return p, p.b.add("EvaluateConcepts", **given)


def table_of(outputs: dict, node: Node) -> dict[tuple[str, str], float]:
    """(measure, concept) -> mean, from the text."""
    found = {}
    for line in str(outputs[node.id]["text"][0]).split("\n\n")[0].splitlines()[1:]:
        cells = re.split(r"  +", line)
        if re.fullmatch(r"-?\d\.\d{3}", cells[1]):
            cells.insert(1, "")
        found[cells[0], cells[1]] = float(cells[2])
    return found


def test_the_pictures_are_core_samplers(server: Server) -> None:
    """Core's KSampler with the node's settings, for the second picture of the first prompt."""
    p, node = evaluating()
    p.b.add("TestDump", value=node[2], name="pictures")
    p.b.add("PreviewImage", images=node[1])
    applied = p.b.add(
        "ApplyConceptTokens", model=p.model, clip=p.model[1], concepts=p.learn, strength=1.0
    )
    text = p.b.add("CLIPTextEncode", clip=applied[1], text="a photo of <rex> on sand")
    empty = p.b.add("CLIPTextEncode", clip=p.model[1], text="")
    latent = p.b.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    sampled = p.b.add(
        "KSampler", model=applied, positive=text, negative=empty, latent_image=latent, seed=6, steps=4, cfg=3.0,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    p.b.add("TestDump", value=p.b.add("VAEDecode", samples=sampled, vae=p.model[2]), name="core")
    server.run(p.b.graph)
    ours, core = server.dumped("pictures")["x"], server.dumped("core")["x"]
    assert ours.shape == (4, 64, 64, 3)
    torch.testing.assert_close(ours[1], core[0].clamp(0, 1), atol=1 / 255, rtol=0)


def test_diversity_is_of_cores_encoder(server: Server) -> None:
    """1 minus the cosine of what CLIP Vision Encode gives for each prompt's two pictures."""
    p, node = evaluating(seed=8)
    encoded = p.b.add(
        "CLIPVisionEncode", clip_vision=vision(p.b, "dino"), image=node[2], crop="center"
    )
    seen = p.b.add("TestVisionEmbeds", output=encoded)
    p.b.add("TestDump", value=seen, name="embeds")
    found = table_of(server.run(p.b.graph), node)
    a, b, c, d = torch.nn.functional.normalize(server.dumped("embeds")["x"], dim=-1)
    expected = (2 - float(a @ b) - float(c @ d)) / 2
    assert found["diversity, 1 - DINO", ""] == pytest.approx(expected, abs=6e-4)
    assert {"identity, CLIP", "identity, DINO", "found"} <= {measure for measure, _ in found}
    assert ("prompt agreement", "") not in found


def test_a_report_with_a_whole_clip(server: Server) -> None:
    """Saved twice, in folders of their own; a whole CLIP measures the prompts and identity too."""
    save_clip(server.base / "models" / "visual_concepts_encoders" / "tiny")
    for number in (1, 2):
        p, node = evaluating(
            text_clip="tiny", clip_vision=None, dino=None, save_as="mine", count=number
        )
        found = table_of(server.run(p.b.graph), node)
        assert ("prompt agreement", "") in found and ("diversity, 1 - DINO", "") not in found
        assert {m for m, _ in found} >= {"identity, CLIP"} or found["found", "all"] == 0
        folder = server.base / "output" / "evaluations" / f"mine_{number:05d}"
        assert "a photo of &lt;rex&gt; on sand" in (folder / "report.html").read_text()
        assert len(list((folder / "pictures").glob("prompt_*.png"))) == 2 * number
    assert {f.name for f in folder.iterdir()} == {
        "report.html", "sheet.png", "summary.csv", "pictures.csv", "prompts.csv", "pictures",
    }  # fmt: skip
    shown = np.asarray(Image.open(folder / "pictures" / "prompt_01_seed_6.png"))
    assert shown.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ""}, "No prompt to draw"),
        ({"prompts": "a photo of a star"}, "Prompt 1 marks no concept"),
        ({"prompts": "<max> on sand"}, "Prompt 1 marks <max>"),
        ({"prompts": "<rex> on venus"}, "does not know the word 'venus'"),
        ({"clip_vision": None, "dino": None}, "nothing to measure with"),
        ({"save_as": "../x"}, "Bad name"),
        ({"text_clip": "elsewhere"}, "(?i)not in list"),
    ],
    ids=["no-prompt", "no-mark", "unknown", "word", "no-encoder", "name", "folder"],
)
def test_bad_input_is_said(server: Server, changes: dict[str, Any], said: str) -> None:
    p, _ = evaluating(**changes)
    with pytest.raises(Failed, match=said):
        server.run(p.b.graph)


def test_concepts_are_applied_once(server: Server) -> None:
    p, node = evaluating()
    applied = p.b.add(
        "ApplyConceptTokens", model=p.model, clip=p.model[1], concepts=p.learn, strength=1.0
    )
    p.b.graph[node.id]["inputs"] |= {"model": [applied.id, 0], "clip": [applied.id, 1]}
    with pytest.raises(Failed, match=r"knows rex, doll already.*from before Apply Concept Tokens"):
        server.run(p.b.graph)


def test_other_pictures_are_refused(server: Server) -> None:
    """Examples that the concepts were not learned from."""
    p, node = evaluating()
    other = p.b.add("ConceptExample", image=p.scene, prompt="a photo of <max:star> on grass")
    p.b.graph[node.id]["inputs"]["examples"] = [other.id, 0]
    with pytest.raises(Failed, match="not the pictures that the concepts were learned from"):
        server.run(p.b.graph)
