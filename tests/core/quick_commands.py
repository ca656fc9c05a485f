"""Commands of a second or less, in a folder with a scene, its concepts, and what `export` makes of them."""

from pathlib import Path

from em_core.__main__ import main
from em_core.hosts.diffusers import DiffusersHost
from em_core.prompts import Concept
from em_core.runs.concept_set import ConceptSet


def make_world(folder: Path, host: DiffusersHost) -> Path:
    """Write the scene into `scene`, concepts that were never learned into `learned`, the exports into
    `exports`."""
    assert main(["scene", "--seed", "5", "--out", str(folder / "scene"), "--quiet"]) == 0
    tables = {encoder: vocabulary.table for encoder, vocabulary in host.vocabularies().items()}
    vectors = {
        name: {encoder: table[[row]].clone() for encoder, table in tables.items()}
        for name, row in (("rex", 320), ("doll", 321))
    }
    made = ConceptSet((Concept("rex"), Concept("doll")), vectors, host.identity())
    made.save(folder / "learned" / "concepts.safetensors")
    given = ["--concepts", str(folder / "learned"), "--name", "x", "--out", str(folder / "exports")]
    assert main(["export", *given, "--quiet"]) == 0
    return folder


def of_picture(world: Path) -> list[str]:
    prompt = (world / "scene" / "prompt.txt").read_text().strip()
    return ["--image", str(world / "scene" / "image.png"), "--prompt", prompt]


def command(name: str, world: Path, out: Path) -> list[str]:
    """A command of this name that writes into `out`."""
    concepts = ["--concepts", str(world / "learned")]
    picture, truth = of_picture(world), str(world / "scene")
    told = {
        "scene": ["--seed", "5"],
        "generate": [*concepts, "--prompt", "a photo of <rex>", "--count", "2", "--steps", "1"],
        "masks": [*picture, "--passes", "1", "--no-crf"],
        "discover": picture[:2],
        "refine": [*picture[:2], "--mask", f"{truth}/mask_rex.png", "--iterations", "1"],
        "import": ["--file", str(world / "exports" / "x_00001.safetensors"), "--name", "rex"],
        "export": [*concepts, "--name", "rex"],
        "dataset": [*picture, "--masks", truth, "--layout", "OneTrainer"],
        "learn": [*picture, "--truth", truth, "--steps", "1", "--no-crf"],
    }
    target = out / "rex.safetensors" if name == "import" else out
    return [name, *told[name], "--out", str(target)]
