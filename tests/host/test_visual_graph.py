"""The visual condition's nodes in whole graphs of a running server."""

import time

import pytest
import torch
from graphs import Parts, learning, sample
from server import Failed, Node, Server
from test_running import queue_and_wait_for

TEXT = "a photo of <rex> on sand"


def condition(p: Parts, patch: str = "", **changes: object) -> Node:
    """Learn Visual Condition on a graph's examples, in few steps."""
    inputs = {
        "method": "several concepts", "masks": "find once", "steps": 4, "seed": 0,
        "memory": "automatic", "em_steps": 2, "settings": p.b.add("ConceptSettings", batch=1),
    } | changes  # fmt: skip
    model = p.b.add(patch, model=p.model, seconds=0.015) if patch else p.model
    return p.b.add(
        "LearnVisualCondition", model=model, clip=p.model[1], vae=p.model[2], examples=p.examples,
        **inputs,
    )  # fmt: skip


def parts() -> Parts:
    """The demo model and a scene; nothing is learned yet."""
    p = learning()
    del p.b.graph[p.learn.id]
    return p


def applied(p: Parts, made: Node, **changes: object) -> Node:
    inputs = {"strength": 1.0, "start": 0.0, "end": 1.0} | changes
    return p.b.add("ApplyVisualCondition", model=p.model, clip=p.model[1], condition=made, **inputs)


def test_learn_save_load_apply(server: Server) -> None:
    """Strength 0 is the model with the same tokens; a reference of one's own needs the VAE alone."""
    p = parts()
    made = condition(p)
    for name, changes in (("off", {"strength": 0.0}), ("on", {"strength": 2.0})):
        ours = applied(p, made, **changes)
        p.b.add("TestDump", value=sample(p.b, ours, ours[1], TEXT), name=name)
    tokens = p.b.add(
        "ApplyConceptTokens", model=p.model, clip=p.model[1], concepts=made[1], strength=1.0
    )
    p.b.add("TestDump", value=sample(p.b, tokens, tokens[1], TEXT), name="tokens")
    p.b.add("TestDump", value=made[3], name="loss")
    p.b.add("TestDump", value=made[2], name="masks")
    ours = applied(p, made, reference=p.scene, vae=p.model[2], masks=p.scene[2])
    p.b.add("TestDump", value=sample(p.b, ours, ours[1], TEXT), name="other")
    p.b.add("SaveVisualCondition", condition=made, name="seen", overwrite=True)
    p.b.add("TestModelHash", model=p.model, clip=p.model[1])
    server.run(p.b.graph)
    dumps = {n: server.dumped(n)["x/samples"] for n in ("off", "on", "tokens", "other")}
    assert torch.equal(dumps["off"], dumps["tokens"])
    assert not torch.equal(dumps["on"], dumps["off"]) and torch.isfinite(dumps["other"]).all()
    assert len(server.dumped("loss")) == 2 + 4
    assert server.dumped("masks")["x"].shape == (2, 64, 64)
    again = parts()
    loaded = again.b.add("LoadVisualCondition", name="seen.safetensors")
    ours = applied(again, loaded, strength=2.0)
    again.b.add("TestDump", value=sample(again.b, ours, ours[1], TEXT), name="loaded")
    server.run(again.b.graph)
    assert torch.equal(server.dumped("loaded")["x/samples"], dumps["on"])


def test_interrupted_and_queued_again(server: Server) -> None:
    """Stopped in the middle and queued again: the same, bit for bit, as never stopped."""
    folder = server.base / "models" / "visual_conditions"
    runs = server.base / "user" / "visual_concepts" / "runs"

    def graph(name: str) -> Parts:
        p = parts()
        made = condition(p, "TestSlow", steps=20, seed=5)
        p.b.add("SaveVisualCondition", condition=made, name=name, overwrite=True)
        return p

    p, before = graph("stopped"), set(runs.glob("*.state.safetensors"))
    prompt = queue_and_wait_for(server, p, "Learning has begun")
    time.sleep(1)
    server.post("/interrupt", {})
    kinds = [kind for kind, _ in server.wait(prompt, 60)["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert len(set(runs.glob("*.state.safetensors")) - before) == 1
    server.run(p.b.graph)
    assert not set(runs.glob("*.state.safetensors")) - before
    for file in runs.glob("*.condition.safetensors"):
        file.unlink()
    server.forget()
    server.run(graph("whole").b.graph)
    stopped, whole = ((folder / f"{n}.safetensors").read_bytes() for n in ("stopped", "whole"))
    assert stopped == whole


@pytest.mark.parametrize("case", ["vae", "masks", "empty", "range"])
def test_bad_input(server: Server, case: str) -> None:
    """A reference without a VAE, masks too few or empty, and a range that ends before it starts."""
    p = parts()
    made = p.b.add("LoadVisualCondition", name="seen.safetensors")
    mask = p.b.add("SolidMask", value=0.0, width=64, height=64)
    both = p.b.add(
        "MaskComposite", destination=p.scene[2], source=mask, x=0, y=0, operation="multiply"
    )
    changes, words = {
        "vae": ({"reference": p.scene}, "needs the VAE"),
        "masks": ({"reference": p.scene, "vae": p.model[2], "masks": mask}, "Bad number of masks"),
        "empty": ({"reference": p.scene, "vae": p.model[2], "masks": both}, "is empty"),
        "range": ({"start": 0.8, "end": 0.2}, "range of the sampling"),
    }[case]
    ours = applied(p, made, **changes)
    p.b.add("TestDump", value=sample(p.b, ours, ours[1], TEXT), name="never")
    with pytest.raises(Failed, match=words):
        server.run(p.b.graph)
