"""What a user can get wrong shows on the node, in words."""

from typing import Any

import pytest
from graphs import learning
from server import Builder, Failed, Server


def example(prompt: str, masks: bool = False, count: int = 2) -> Builder:
    """A graph of a ConceptExample alone."""
    b = Builder()
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    given = {"masks": b.add("SolidMask", value=1.0, width=64, height=64)} if masks else {}
    b.add("TestDump", value=b.add("ConceptExample", image=scene, prompt=prompt, **given), name="e")
    return b


@pytest.mark.parametrize(
    ("prompt", "masks", "message"),
    [
        ("", False, "prompt is empty"),
        ("a photo of a dog", False, "No concept"),
        ("<rex:star> and <rex>", False, "more than once"),
        ("a photo of <rex:star", False, "Unbalanced"),
        ("a photo of <1 2:star>", False, "Bad concept name"),
        ("<rex:star> and <doll:heart>", True, "Expected 2"),
    ],
)
def test_examples(server: Server, prompt: str, masks: bool, message: str) -> None:
    with pytest.raises(Failed, match=message) as error:
        server.run(example(prompt, masks).graph)
    assert error.value.node == "ConceptExample"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "..", "a b", "x.safetensors"])
def test_names_stay_in_their_folder(server: Server, name: str) -> None:
    p = learning()
    p.b.add("SaveConcepts", concepts=p.learn, name=name, overwrite=True, exports=True)
    with pytest.raises(Failed, match=r"Bad name .* Expected up to 100 letters"):
        server.run(p.b.graph)


@pytest.mark.parametrize("name", ["con", "NUL", "Lpt1", "COM9"])
def test_reserved_names_are_said_to_be_reserved(server: Server, name: str) -> None:
    p = learning()
    p.b.add("SaveConcepts", concepts=p.learn, name=name, overwrite=True, exports=True)
    with pytest.raises(Failed, match="Windows reserves it for a device.* such as " + name + "_1"):
        server.run(p.b.graph)


def test_names_that_differ_only_in_case_do_not_collide(server: Server) -> None:
    """Neither of the file itself nor of one that is exported with it; one name is still one's own."""
    folder = server.base / "models" / "embeddings"
    (folder / "case_REX_sd-64.safetensors").write_bytes(b"someone's")

    def save(name: str) -> Any:
        p = learning(steps=2)
        p.b.add("SaveConcepts", concepts=p.learn, name=name, overwrite=True, exports=True)
        return p.b.graph

    try:
        with pytest.raises(Failed, match=r"case_REX_sd-64\.safetensors.* differs only in upper"):
            server.run(save("case"))
        server.run(save("own"))
        with pytest.raises(Failed, match=r"own\.safetensors.* differs only in upper"):
            server.run(save("OWN"))
    finally:
        (folder / "case_REX_sd-64.safetensors").unlink()


def test_concepts_that_differ_only_in_case(server: Server) -> None:
    with pytest.raises(Failed, match="Rex and rex differ only in upper and lower case"):
        server.run(example("<Rex:star> and <rex:heart>").graph)


def test_saving_over_a_file_needs_a_choice(server: Server) -> None:
    """Without it, files are numbered, also beside one of another case; all of a number together."""

    def save(overwrite: bool, steps: int) -> Any:
        p = learning(steps=steps)
        p.b.add("SaveConcepts", concepts=p.learn, name="once", overwrite=overwrite, exports=True)
        return p.b.graph

    server.run(save(True, 2))
    models = server.base / "models"
    file = models / "visual_concepts" / "once.safetensors"
    before = file.read_bytes()
    (models / "embeddings" / "ONCE_00004_x.safetensors").touch()
    server.run(save(False, 3))
    server.run(save(False, 4))
    assert file.read_bytes() == before
    found = {f.name for f in models.rglob("once_*") if "sd-64" not in f.name}
    assert found == {"once_00005.safetensors", "once_00006.safetensors"}
    assert len([*models.rglob("once_0000?_*_sd-64.safetensors")]) == 4
    server.run(save(True, 3))
    assert file.read_bytes() != before


def test_full_disk(server: Server) -> None:
    """A folder that cannot take the file: the message names it and nothing is left behind."""
    folder = server.base / "models" / "embeddings" / "disk_rex_sd-64.safetensors"
    folder.mkdir()
    p = learning()
    p.b.add("SaveConcepts", concepts=p.learn, name="disk", overwrite=True, exports=True)
    try:
        with pytest.raises(Failed, match="Could not write"):
            server.run(p.b.graph)
        assert not (server.base / "models" / "visual_concepts" / "disk.safetensors").exists()
    finally:
        folder.rmdir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "given"}, "No mask"),
        ({"steps": 0}, "smaller than min"),
        ({"joint": "all weights", "memory": "half"}, "does not fit"),
    ],
    ids=["no-masks", "no-steps", "no-memory"],
)
def test_learning(server: Server, changes: dict[str, Any], message: str) -> None:
    p = learning(**changes)
    if changes.get("mode") == "given":
        p.b.graph[p.examples.id]["inputs"].pop("masks")
    p.b.add("TestDump", value=p.learn[1], name="x")
    with pytest.raises(Failed, match=message):
        server.run(p.b.graph)


@pytest.mark.parametrize("node", ["LearnConcepts", "ExtractLatentMasks"])
def test_a_patch_that_cannot_be_run(server: Server, node: str) -> None:
    """The message names the nodes whose patches are on the MODEL, and says where to connect ours."""
    p = learning()
    free = p.b.add("FreeU_V2", model=p.model, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
    broken = p.b.add("TestBrokenPatch", model=free)
    scene = {"image": p.scene, "prompt": p.scene[1]}
    given = {"clip": p.model[1], "vae": p.model[2]}
    if node == "LearnConcepts":
        p.b.graph[p.learn.id]["inputs"]["model"] = [broken.id, 0]
        found = p.learn
    else:
        found = p.b.add(node, model=broken, **given, **scene)
    p.b.add("TestDump", value=found[1], name="never")
    with pytest.raises(Failed, match=r"my_sampler.*FreeU_V2, TestBrokenPatch \(helpers\)") as error:
        server.run(p.b.graph)
    assert error.value.node == node
    title = {"LearnConcepts": "Learn Concepts", "ExtractLatentMasks": "Extract Latent Masks"}[node]
    assert f"from before such a node to {title}" in error.value.message


def test_a_word_that_the_demo_model_does_not_know(server: Server) -> None:
    b = Builder()
    model = b.add("LoadConceptDemoModel")
    b.add("TestDump", value=b.add("CLIPTextEncode", clip=model[1], text="a dragon"), name="x")
    with pytest.raises(Failed, match="does not know the word 'dragon'"):
        server.run(b.graph)


def test_nothing_known_of_a_name(server: Server) -> None:
    b = Builder()
    model, scene = b.add("LoadConceptDemoModel"), b.add("ConceptDemoScene", seed=3, kind="A")
    found = b.add(
        "ExtractLatentMasks",
        model=model,
        clip=model[1],
        vae=model[2],
        image=scene,
        prompt="a photo of <rex>",
    )
    b.add("TestDump", value=found, name="x")
    with pytest.raises(Failed, match="Nothing is known of <rex>"):
        server.run(b.graph)


def test_masks_of_another_count(server: Server) -> None:
    b = Builder()
    scene = b.add("ConceptDemoScene", seed=3, kind="A")
    one = b.add("SolidMask", value=1.0, width=64, height=64)
    b.add("TestDump", value=b.add("CompareConceptMasks", mask=one, reference=scene[2]), name="x")
    with pytest.raises(Failed, match="one per reference mask"):
        server.run(b.graph)


def test_damaged_concept_file(server: Server) -> None:
    file = server.base / "models" / "visual_concepts" / "broken.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\x80\x04pickle")
    b = Builder()
    b.add("TestDump", value=b.add("LoadConcepts", name="broken.safetensors"), name="x")
    with pytest.raises(Failed, match="not a complete safetensors file"):
        server.run(b.graph)
