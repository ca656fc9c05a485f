"""Core ComfyUI's own nodes say whether what we give is right."""

import pytest
import torch
from graphs import PROMPT, applied, learning, sample
from server import Builder, Server

LONG = " and ".join(
    ["a photo of <rex>", *["a red star on sand"] * 12, "(<doll>:1.3)", "(a star:0.7)"]
)
TEXTS = [PROMPT, "(<rex>:1.2), a photo, <doll>, (on grass:0.8)", LONG]


@pytest.fixture(scope="module")
def saved(server: Server) -> Server:
    """A server on which two concepts of several vectors, and a LoRA, are learned and saved."""
    p = learning(joint="LoRA", joint_steps=4, vectors=3)
    p.b.add(
        "SaveConcepts", concepts=p.learn, name="two", overwrite=True, exports=True, clip=p.model[1],
        triggers="rex: sks ohwx snf, doll: hns bsf gsc",
    )  # fmt: skip
    p.b.add("SaveLoRA", lora=p.learn[2], prefix="loras/trained", steps=4)
    p.b.add("LossGraphNode", loss=p.learn[3], filename_prefix="loss")
    outputs = server.run(p.b.graph)
    (said,) = (str(of) for of in outputs.values() if "two_lora" in str(of))
    assert "embedding:two_rex_sd-64" in said
    assert "`sks ohwx snf` means rex, `hns bsf gsc` means doll" in said
    return server


def stock_words(text: str) -> str:
    """The prompt as one writes it without this pack."""
    for name in ("rex", "doll"):
        text = text.replace(f"<{name}>", f" embedding:two_{name}_sd-64 ")
    return text


def trigger_words(text: str) -> str:
    """The prompt as one writes it with the trigger words of the one LoRA file."""
    return text.replace("<rex>", " sks ohwx snf ").replace("<doll>", " hns bsf gsc ")


@pytest.mark.parametrize("text", TEXTS, ids=["plain", "weights", "long"])
def test_conditioning_equals_stock_embeddings(saved: Server, text: str) -> None:
    p = learning(joint="LoRA", joint_steps=4, vectors=3)
    lora = p.b.add(
        "LoraLoader", model=p.model, clip=p.model[1], lora_name="two.safetensors",
        strength_model=1.0, strength_clip=1.0,
    )  # fmt: skip
    cases = (
        ("ours", applied(p)[1], text),
        ("stock", lora[1], stock_words(text)),
        ("words", lora[1], trigger_words(text)),
    )
    for name, clip, words in cases:
        encoded = p.b.add("CLIPTextEncode", clip=clip, text=words)
        p.b.add("TestDump", value=encoded, name=name)
    saved.run(p.b.graph)
    ours, stock, words = (saved.dumped(name) for name in ("ours", "stock", "words"))
    assert ours["x/0/0"].shape[1] == (154 if text == LONG else 77)
    assert set(ours) == set(stock) == set(words)
    for name in ours:
        assert torch.equal(ours[name], stock[name]), name
        torch.testing.assert_close(words[name], ours[name], atol=1e-5, rtol=0)


def test_lora_loader_gives_the_same_pictures(saved: Server) -> None:
    before = len(saved.log_text())
    p = learning(joint="LoRA", joint_steps=4, vectors=3)
    ours = applied(p)
    lora = p.b.add(
        "LoraLoader", model=p.model, clip=p.model[1], lora_name="two.safetensors",
        strength_model=1.0, strength_clip=1.0,
    )  # fmt: skip
    plain = sample(p.b, p.model, p.model[1], "a photo of a star on grass")
    for name, node in (
        ("ours", sample(p.b, ours, ours[1], PROMPT)),
        ("stock", sample(p.b, lora, lora[1], stock_words(PROMPT))),
        ("words", sample(p.b, lora, lora[1], trigger_words(PROMPT))),
        ("plain", plain),
    ):
        p.b.add("TestDump", value=node, name=name)
    saved.run(p.b.graph)
    ours_x, stock_x = saved.dumped("ours")["x/samples"], saved.dumped("stock")["x/samples"]
    assert torch.equal(ours_x, stock_x)
    torch.testing.assert_close(saved.dumped("words")["x/samples"], ours_x, atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours_x, saved.dumped("plain")["x/samples"])
    log = saved.log_text()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log


def test_core_saves_our_lora(saved: Server) -> None:
    """The file of core's SaveLoRA holds what SaveConcepts exports without the tokens."""
    from safetensors.torch import load_file

    (file,) = (saved.base / "output" / "loras").glob("trained_4_steps_*.safetensors")
    ours = load_file(saved.base / "models" / "loras" / "two_lora.safetensors")
    core = load_file(file)
    assert set(core) == set(ours) and all(torch.equal(core[n], ours[n]) for n in ours)


def test_saved_concepts_load_again(saved: Server) -> None:
    p = learning(joint="LoRA", joint_steps=4, vectors=3)
    p.b.add("TestDump", value=applied(p)[1], name="unused")
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    loaded = b.add("LoadConcepts", name="two.safetensors")
    clip = b.add("ApplyConceptTokens", model=model, clip=model[1], concepts=loaded, strength=1.0)
    b.add("TestDump", value=b.add("CLIPTextEncode", clip=clip[1], text=PROMPT), name="loaded")
    fresh = applied(p)
    p.b.add("TestDump", value=p.b.add("CLIPTextEncode", clip=fresh[1], text=PROMPT), name="fresh")
    saved.run(b.graph)
    saved.run(p.b.graph)
    assert torch.equal(saved.dumped("loaded")["x/0/0"], saved.dumped("fresh")["x/0/0"])


def test_strength_zero_is_the_start_words(saved: Server) -> None:
    """At strength 0 a concept of one vector per piece is its words."""
    b = Builder()
    model, scene = b.add("LoadConceptDemoModel"), b.add("ConceptDemoScene", seed=3, kind="A")
    example = b.add("ConceptExample", image=scene, prompt="a photo of <rex:red star> on <bg:grass>")
    learn = b.add(
        "LearnConcepts", model=model, clip=model[1], vae=model[2], examples=example, mode="none",
        steps=3, seed=0, joint="nothing", memory="automatic",
        settings=b.add("ConceptSettings", vectors=2),
    )  # fmt: skip
    for name, strength in (("zero", 0.0), ("one", 1.0)):
        clip = b.add(
            "ApplyConceptTokens", model=model, clip=model[1], concepts=learn, strength=strength
        )
        b.add(
            "TestDump",
            value=b.add("CLIPTextEncode", clip=clip[1], text="a photo of <rex>"),
            name=name,
        )
    words = b.add("CLIPTextEncode", clip=model[1], text="a photo of red star")
    b.add("TestDump", value=words, name="words")
    saved.run(b.graph)
    assert torch.equal(saved.dumped("zero")["x/0/0"], saved.dumped("words")["x/0/0"])
    assert not torch.equal(saved.dumped("one")["x/0/0"], saved.dumped("words")["x/0/0"])


def test_layout_in_a_graph(saved: Server) -> None:
    """Masks of everything change nothing; masks of one half do; a patch of another pack keeps acting."""
    p = learning(joint="LoRA", joint_steps=4, vectors=3)
    half = p.b.add("SolidMask", value=0.0, width=32, height=64)
    full = p.b.add("SolidMask", value=1.0, width=64, height=64)
    half = p.b.add("MaskComposite", destination=full, source=half, x=32, y=0, operation="multiply")
    patched = p.b.add("TestAttentionPatch", model=p.model, scale=0.5)
    cases = {
        "none": (p.model, None),
        "full": (p.model, full),
        "half": (p.model, half),
        "patch": (patched, full),
    }
    for name, (model, mask) in cases.items():
        given = {}
        if mask is not None:
            image = p.b.add("RepeatImageBatch", image=p.b.add("MaskToImage", mask=mask), amount=2)
            given = {"masks": p.b.add("ImageToMask", image=image, channel="red")}
        ours = p.b.add(
            "ApplyConceptTokens",
            model=model,
            clip=p.model[1],
            concepts=p.learn,
            strength=1.0,
            **given,
        )
        p.b.add("TestDump", value=sample(p.b, ours, ours[1], PROMPT), name=name)
    saved.run(p.b.graph)
    found = {name: saved.dumped(name)["x/samples"] for name in cases}
    torch.testing.assert_close(found["full"], found["none"], atol=1e-3, rtol=1e-3)
    assert (found["half"] - found["none"]).abs().max() > 0.01
    assert (found["patch"] - found["none"]).abs().max() > 0.01
