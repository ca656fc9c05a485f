"""Marks in prompts: what is not understood shows on the node; embeddings are a start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from found import run_script
from graphs import applied, learning
from safetensors.torch import load_file, save_file
from server import Builder, Failed, Server


def encoding(clip: Any, b: Builder, text: str, name: str = "encoded") -> None:
    b.add("TestDump", value=b.add("CLIPTextEncode", clip=clip, text=text), name=name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a photo of <foo>", "knows no concept foo. It knows: rex, doll"),
        ("a photo of <rex:dog> and <Rex>", "knows no concept Rex"),
        ("a photo of <rex> <lora:style:1>", "Load LoRA"),
    ],
)
def test_unknown_marks(server: Server, text: str, message: str) -> None:
    p = learning()
    encoding(applied(p)[1], p.b, text)
    with pytest.raises(Failed, match=message) as error:
        server.run(p.b.graph)
    assert error.value.node == "CLIPTextEncode"


def test_the_demo_models_own_clip(server: Server) -> None:
    b = Builder()
    encoding(b.add("LoadConceptDemoModel")[1], b, "a photo of <rex>")
    with pytest.raises(Failed, match="connect the CLIP of an Apply Concept Tokens"):
        server.run(b.graph)


def test_angle_brackets_of_plain_text(server: Server) -> None:
    p = learning()
    for text, name in (("a photo <3 of <rex>", "marked"), ("a photo <> of <rex>", "empty")):
        encoding(applied(p)[1], p.b, text, name)
    server.run(p.b.graph)
    assert server.dumped("marked")["x/0/0"].shape == (
        1,
        77,
        server.dumped("empty")["x/0/0"].shape[2],
    )


def test_one_name_twice(server: Server) -> None:
    p = learning()
    first = applied(p)
    again = p.b.add(
        "ApplyConceptTokens", model=first, clip=first[1], concepts=p.learn, strength=0.5
    )
    encoding(again[1], p.b, "a photo of <rex>")
    with pytest.raises(Failed, match="Two Apply Concept Tokens") as error:
        server.run(p.b.graph)
    assert error.value.node == "ApplyConceptTokens"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of <rex:star> <lora:x:1>", "Load LoRA"),
        ("a photo of (<rex:star>:1.3) on grass", "Weights such as '\\(<rex:star>:1.3\\)'"),
        ("a photo of <rex:star> (on grass:0.8)", "Weights such as"),
        ("a photo of <rex:red embedding:one>", "Bad start"),
    ],
)
def test_examples(server: Server, prompt: str, message: str) -> None:
    b = Builder()
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    b.add("TestDump", value=b.add("ConceptExample", image=scene, prompt=prompt), name="e")
    with pytest.raises(Failed, match=message) as error:
        server.run(b.graph)
    assert error.value.node == "ConceptExample"


def from_embedding(prompt: str, steps: int = 1) -> Any:
    """A graph that learns one concept, without masks, which is quick."""
    p = learning(mode="none", steps=steps, batch=1, learning_rate=1e-3)
    p.b.graph[p.examples.id]["inputs"] |= {"prompt": prompt}
    p.b.graph[p.examples.id]["inputs"].pop("masks")
    return p


def test_start_from_an_embedding(server: Server) -> None:
    """At strength 0 the concept is the embedding, as ComfyUI reads it; at 1 it has learned."""
    folder = server.base / "models" / "embeddings"
    p = from_embedding("a photo of <rex:star>")
    p.b.add("SaveConcepts", concepts=p.learn, name="width", overwrite=True, exports=True)
    server.run(p.b.graph)
    width = load_file(folder / "width_sd-64.safetensors")["emb_params"].shape[1]
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 0.02
    save_file({"emb_params": vectors}, folder / "begin.safetensors")
    p = from_embedding("a photo of <rex:embedding:begin>")
    for strength in (0.0, 1.0):
        ours = p.b.add(
            "ApplyConceptTokens",
            model=p.model,
            clip=p.model[1],
            concepts=p.learn,
            strength=strength,
        )
        encoding(ours[1], p.b, "a photo of <rex> on grass", f"at{strength:.0f}")
    encoding(p.model[1], p.b, "a photo of embedding:begin on grass", "stock")
    server.run(p.b.graph)
    stock, none, all_ = (server.dumped(name)["x/0/0"] for name in ("stock", "at0", "at1"))
    assert torch.equal(none, stock)
    assert 0 < (all_ - stock).abs().max() < 0.5


def test_embeddings_that_are_no_start(server: Server) -> None:
    save_file(
        {"emb_params": torch.zeros(2, 7)}, server.base / "models/embeddings/narrow.safetensors"
    )
    (server.base / "models/embeddings/broken.safetensors").write_bytes(b"no tensors")
    for prompt, message in (
        ("a photo of <rex:embedding:missing>", "no embedding 'missing'"),
        ("a photo of <rex:embedding:broken>", "no embedding 'broken'"),
        ("a photo of <rex:embedding:narrow>", "got 7"),
        ("a photo of <rex:star> on embedding:missing", "no embedding 'missing'"),
        ("a photo of <rex:star> on embedding:narrow, grass", "got 7"),
    ):
        p = from_embedding(prompt)
        p.b.add("TestDump", value=p.learn[3], name="never")
        with pytest.raises(Failed, match=message) as error:
            server.run(p.b.graph)
        assert error.value.node == "LearnConcepts"


def told(comfyui: Path, server: Server, b: Builder) -> dict[str, str]:
    """What is shown on the nodes of a graph while it is queued and run."""
    graph, out = server.base / "graph.json", server.base / "told.json"
    graph.write_text(json.dumps(b.graph))
    run_script(comfyui, "told.py", server.port, graph, out)
    return dict(json.loads(out.read_text()))


def test_told_on_the_nodes_of_a_queued_graph(comfyui: Path, server: Server) -> None:
    """A CLIP that no Apply Concept Tokens has been at, and nodes of which only one output is used."""
    p = learning(steps=2)
    p.b.graph[p.examples.id]["inputs"]["prompt"] = "a photo of <rex:star> and <doll:heart>"
    stock = p.b.add("TestStockClip", clip=p.model[1])
    forgotten = p.b.add("CLIPTextEncode", clip=stock, text="a photo of <rex> and <other>")
    p.b.add("TestDump", value=forgotten, name="forgotten")
    clip_only, tokens_only, model_only, both = (applied(p) for _ in range(4))
    p.b.graph[clip_only.id]["inputs"]["masks"] = [p.scene.id, 2]
    encoding(clip_only[1], p.b, "a photo of <rex>")
    encoding(tokens_only[1], p.b, "a photo of <rex>", "tokens")
    p.b.add("TestDump", value=model_only, name="model")
    encoding(both[1], p.b, "a photo of <doll>")
    p.b.add("TestDump", value=both, name="both")
    found = told(comfyui, server, p.b)
    assert set(found) - {p.learn.id} == {forgotten.id, clip_only.id, model_only.id}
    assert "<rex>" in found[forgotten.id] and "<other>" not in found[forgotten.id]
    assert "Only the CLIP" in found[clip_only.id] and "Only the MODEL" in found[model_only.id]


def test_told_where_the_names_are_not_written_out(comfyui: Path, server: Server) -> None:
    """The example's prompt comes from another node: any name may be a concept's."""
    b = Builder()
    stock = b.add("TestStockClip", clip=b.add("LoadConceptDemoModel")[1])
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    b.add("TestDump", value=b.add("ConceptExample", image=scene, prompt=scene[1]), name="e")
    marked = b.add("CLIPTextEncode", clip=stock, text="a photo of <any>")
    plain = b.add("CLIPTextEncode", clip=stock, text="a photo <3 of a <lora:x:1> > b")
    for node in (marked, plain):
        b.add("TestDump", value=node, name=f"node{node.id}")
    assert set(told(comfyui, server, b)) == {marked.id}


def save_tokens(server: Server) -> None:
    """Two concepts and a LoRA, in models/loras/tokens.safetensors, with `sks` and `ohwx` in it."""
    p = learning(steps=2, joint="LoRA", joint_steps=2)
    given = {"concepts": p.learn, "clip": p.model[1], "overwrite": True, "exports": True}
    p.b.add("SaveConcepts", name="tokens", triggers="rex: sks, doll: ohwx", **given)
    server.run(p.b.graph)


def test_told_of_tokens_that_nothing_uses(comfyui: Path, server: Server) -> None:
    """A loader that drops them, and prompts without their trigger words."""
    save_tokens(server)
    for text, silent in (("a photo of sks on grass", True), ("a photo of a star", False)):
        b = Builder()
        model = b.add("LoadConceptDemoModel")
        given = {"lora_name": "tokens.safetensors", "model": model, "strength_model": 1.0}
        alone = b.add("LoraLoaderModelOnly", **given)
        whole = b.add("LoraLoader", clip=model[1], strength_clip=1.0, **given)
        encoding(whole[1], b, text)
        for node in (alone, whole):
            b.add("TestDump", value=node, name=f"node{node.id}")
        found = told(comfyui, server, b)
        assert "has the tokens of rex, doll" in found[alone.id]
        assert (whole.id not in found) == silent
    assert "No prompt of this graph has a trigger word" in found[whole.id]
    assert "sks (rex), ohwx (doll)" in found[whole.id]


def test_files_of_other_programs_load_as_concepts(server: Server) -> None:
    """An embedding and a LoRA of models/embeddings and models/loras, under names of their own."""
    save_tokens(server)
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    own = b.add("LoadConcepts", name="tokens.safetensors")
    embedding = b.add("LoadConcepts", name="embeddings/tokens_rex_sd-64.safetensors", concept="max")
    lora = b.add(
        "LoadConcepts", name="loras/tokens.safetensors", concept="max", words="sks",
        model=model, clip=model[1],
    )  # fmt: skip
    for name, concepts, text in (
        ("own", own, "<rex>"), ("embedding", embedding, "<max>"), ("lora", lora, "<max>"),
    ):  # fmt: skip
        given = {"model": model, "clip": model[1], "concepts": concepts, "strength": 1.0}
        encoding(b.add("ApplyConceptTokens", **given)[1], b, f"a photo of {text}", name)
    server.run(b.graph)
    found = {n: server.dumped(n)["x/0/0"] for n in ("own", "embedding", "lora")}
    torch.testing.assert_close(found["lora"], found["own"], atol=1e-5, rtol=0)
    assert (found["embedding"] - found["own"]).abs().max() > 1e-4  # without the text encoder's LoRA
    b = Builder()
    b.add("TestDump", value=b.add("LoadConcepts", name="loras/tokens.safetensors"), name="x")
    with pytest.raises(Failed, match="holds several concepts"):
        server.run(b.graph)
