"""What nodes say and show, before, while and after they run; masks by name."""

import pytest
import torch
from graphs import Parts, learning
from safetensors.torch import load_file
from server import Builder, Failed, Server


def said(outputs: dict, node: str) -> str:
    return str(outputs[node]["text"][0])


def two_sizes() -> tuple[Builder, Parts]:
    """Two pictures of different sizes with true masks, learned under them for a step."""
    p = learning(mode="given", steps=1)
    large = p.b.add(
        "ImageScale", image=p.scene, upscale_method="nearest-exact", width=96, height=128,
        crop="disabled",
    )  # fmt: skip
    both = p.b.add(
        "ConceptExample", image=large, prompt=p.scene[1], masks=p.scene[2], examples=p.examples
    )
    p.b.graph[p.learn.id]["inputs"]["examples"] = [both.id, 0]
    return p.b, p


def test_masks_by_name_have_their_pictures_size(server: Server) -> None:
    """Of two sizes, and as ComfyUI's own nodes want them; what they cover is what was given."""
    b, p = two_sizes()
    one = b.add("ConceptMaskByName", examples=p.learn[5], names="doll")
    every = b.add("ConceptMaskByName", examples=p.learn[5], names="")
    b.add("TestDumpList", value=one, name="doll_masks")
    b.add("TestDumpList", value=one[1], name="others")
    b.add("TestDumpList", value=one[2], name="pictures")
    b.add("TestDumpList", value=every, name="all_masks")
    b.add("TestDump", value=p.scene[2], name="true_masks")
    filled = b.add("SetLatentNoiseMask", samples=b.add(
        "VAEEncode", pixels=one[2], vae=p.model[2]
    ), mask=one)  # fmt: skip
    b.add("TestDumpList", value=filled, name="latents")
    outputs = server.run(b.graph)
    true = server.dumped("true_masks")["x"]
    dolls, others = server.dumped("doll_masks"), server.dumped("others")
    assert [tuple(x.shape) for x in dolls.values()] == [(1, 64, 64), (1, 128, 96)]
    assert torch.equal(dolls["x/0"][0], true[1]) and torch.equal(others["x/0"][0], true[0])
    pictures = server.dumped("pictures")
    assert [tuple(x.shape[1:3]) for x in pictures.values()] == [(64, 64), (128, 96)]
    assert torch.equal(server.dumped("all_masks")["x/0"], true)
    assert server.dumped("latents")["x/1/noise_mask"].shape[-2:] == (128, 96)
    assert said(outputs, one.id).startswith("doll ")


def test_a_name_that_is_not_there(server: Server) -> None:
    b, p = two_sizes()
    found = b.add("ConceptMaskByName", examples=p.learn[5], names="kit")
    b.add("TestDumpList", value=found, name="never")
    with pytest.raises(Failed, match=r"No picture has a mask of kit.*masks of: rex, doll"):
        server.run(b.graph)


@pytest.mark.parametrize(
    ("node", "change", "message"),
    [
        (
            "ConceptSettings",
            {"rank": "many"},
            "'also train: LoRA rank'.*whole number from 1 to 128",
        ),
        ("ConceptSettings", {"vectors": "1.5"}, "'vectors per concept'.*got '1.5'"),
        ("ConceptSettings", {"learning_rate": "0"}, "a number above 0, at most 1"),
        ("ConceptSettings", {"flip": True, "prior_weight": 11.0}, "bigger than max"),
        ("ConceptExample", {"prompt": "a photo of <rex:star"}, "Unbalanced"),
        ("SaveConcepts", {"name": "../x"}, "Bad name"),
    ],
)
def test_refused_before_anything_runs(
    server: Server, node: str, change: dict, message: str
) -> None:
    """By the queue itself, which names the node."""
    p = learning()
    p.b.add("SaveConcepts", concepts=p.learn, name="x", overwrite=True, exports=True)
    (number,) = [n for n, of in p.b.graph.items() if of["class_type"] == node]
    p.b.graph[number]["inputs"] |= change
    with pytest.raises(Failed, match=message) as error:
        server.queue(p.b.graph)
    assert error.value.node == node


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"triggers": "kit: sks"}, "Bad trigger words 'kit: sks'"),
        ({"triggers": "rex: visualconcepts"}, "does not know the word 'visualconcepts'"),
        ({"name": "AHEAD", "overwrite": True}, "ahead.safetensors.*differs only in upper"),
    ],
)
def test_what_a_saver_would_refuse_is_said_before_learning(
    server: Server, change: dict, message: str
) -> None:
    file = server.base / "models" / "visual_concepts" / "ahead.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    p = learning(mode="given", seed=77)
    inputs = {"name": "fine", "overwrite": False, "exports": True, "clip": p.model[1]} | change
    p.b.add("SaveConcepts", concepts=p.learn, **inputs)
    told = len(server.log_text())
    try:
        with pytest.raises(Failed, match=message) as error:
            server.run(p.b.graph)
    finally:
        file.unlink()
    assert error.value.node == "LearnConcepts"
    assert "Learning has begun" not in server.log_text()[told:]


def test_learning_leaves_words_on_the_node(server: Server) -> None:
    """Masks by name, and what stands for automatic."""
    p = learning(mode="given", steps=3, rank=2, seed=5)
    p.b.add("TestDump", value=p.learn[1], name="masks")
    outputs = server.run(p.b.graph)
    text = said(outputs, p.learn.id)
    assert "Masks: rex " in text and "vectors per concept 1, learning size (pixels) 64" in text
    assert "samples per step" not in text  # chosen, not automatic


def test_found_masks_are_shown(server: Server) -> None:
    """By names and shares, the threshold that was taken, and a picture."""
    b = Builder()
    model, scene = b.add("LoadConceptDemoModel"), b.add("ConceptDemoScene", seed=3, kind="A")
    found = b.add(
        "ExtractLatentMasks", model=model, clip=model[1], vae=model[2], image=scene,
        prompt=scene[1], passes=2, crf="off",
    )  # fmt: skip
    b.add("TestDump", value=found, name="shown_masks")
    outputs = server.run(b.graph)
    assert "rex " in said(outputs, found.id) and "mask threshold (0 to 1) 0.2" in said(
        outputs, found.id
    )
    (image,) = outputs[found.id]["images"]
    assert (server.base / "temp" / image["filename"]).is_file()


def test_one_mask_that_holds_all_is_split(server: Server) -> None:
    """By its separate parts, from left to right."""
    b = Builder()
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    size = {"width": 64, "height": 64}
    mask = b.add("SolidMask", value=0.0, **size)
    for x in (40, 8):
        patch = b.add("SolidMask", value=1.0, width=12, height=20)
        mask = b.add("MaskComposite", destination=mask, source=patch, x=x, y=20, operation="add")
    example = b.add("ConceptExample", image=scene, prompt="<rex:star> and <doll:heart>", masks=mask)
    for name in ("rex", "doll"):
        found = b.add("ConceptMaskByName", examples=example, names=name)
        b.add("TestDumpList", value=found, name=f"part_{name}")
    outputs = server.run(b.graph)
    expected = torch.zeros(2, 64, 64)
    expected[0, 20:40, 8:20] = 1
    expected[1, 20:40, 40:52] = 1
    for name, mask_of in zip(("rex", "doll"), expected, strict=True):
        assert torch.equal(server.dumped(f"part_{name}")["x/0"][0], mask_of)
    assert "from left to right" in said(outputs, example.id)


def test_going_on_from_concepts(server: Server) -> None:
    """Learned, saved, loaded and learned on: the second run starts where the first one ended."""
    p = learning(mode="given", steps=2, seed=8)
    p.b.add("SaveConcepts", concepts=p.learn, name="begun", overwrite=True, exports=False)
    server.run(p.b.graph)
    on = learning(mode="given", steps=1, seed=8, learning_rate=1e-7)
    loaded = on.b.add("LoadConcepts", name="begun.safetensors")
    on.b.graph[on.learn.id]["inputs"]["concepts"] = [loaded.id, 0]
    on.b.add("SaveConcepts", concepts=on.learn, name="further", overwrite=True, exports=False)
    server.run(on.b.graph)
    folder = server.base / "models" / "visual_concepts"
    before, after = (load_file(folder / f"{name}.safetensors") for name in ("begun", "further"))
    vectors = [name for name in before if name.startswith("vectors/")]
    assert vectors
    for name in vectors:
        assert torch.allclose(before[name], after[name], atol=1e-5)
