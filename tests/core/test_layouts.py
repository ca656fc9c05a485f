"""DreamBench and COCO in tiny folders of the same layout: what is read, what is chosen, a whole run."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import save_clip, save_dino

from em_core.__main__ import main
from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.evaluate import coco
from em_core.evaluate.coco import CLASSES, PROMPTS, Scene, choose, coco_cases, filled
from em_core.evaluate.dreambench import dreambench_cases
from em_core.runs.concept_set import ConceptSet

LIST = """Classes

subject_name,class
rex_toy,star
doll,bear plushie
pet,dog
elsewhere,vase

Prompts

Object Prompts

prompt_list = [
'a photo of a {0} {1} on sand'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""


def dreambench(folder: Path) -> Path:
    """Three of four subjects, with pictures in two formats and another file."""
    (folder / "prompts_and_classes.txt").write_text(LIST)
    for name, count in (("rex_toy", 2), ("doll", 1), ("pet", 1)):
        (folder / name).mkdir()
        for number in range(count):
            image = Image.fromarray(concept_scene(160 + number, "A").image)
            image.save(folder / name / f"{number:02d}.{'jpg' if number else 'PNG'}", "PNG")
    (folder / "pet" / "licence.txt").write_text("ours")
    return folder


def test_dreambench_is_read(tmp_path: Path) -> None:
    toy, doll, pet = dreambench_cases(dreambench(tmp_path))
    assert [case.name for case in (toy, doll, pet)] == ["rex_toy", "doll", "pet"]
    assert [str(p) for p in toy.prompts] == ["a photo of a <rex_toy> on sand", "a red <rex_toy>"]
    assert [str(p) for p in pet.prompts] == ["a <pet> wearing a red hat"]
    examples = toy.read()
    assert [str(e.prompt) for e in examples] == ["a photo of <rex_toy:star>"] * 2
    expected = torch.from_numpy(concept_scene(161, "A").image.copy()).permute(2, 0, 1) / 255
    assert torch.equal(examples[1].picture, expected)
    assert str(doll.read()[0].prompt) == "a photo of <doll:bear plushie>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"remove": "prompts_and_classes.txt"}, r"No .*prompts_and_classes\.txt"),
        ({"text": LIST.replace("Live", "Dead")}, "not DreamBench's list"),
        (
            {"text": LIST.replace("rex_toy", "a").replace("doll", "b").replace("pet", "c")},
            "No subject",
        ),
        ({"remove": "doll/00.PNG"}, "No picture in .*doll"),
    ],
)
def test_what_is_not_dreambench(tmp_path: Path, change: dict[str, str], said: str) -> None:
    folder = dreambench(tmp_path)
    if "remove" in change:
        (folder / change["remove"]).unlink()
    else:
        (folder / "prompts_and_classes.txt").write_text(change["text"])
    with pytest.raises(UserError, match=said):
        dreambench_cases(folder)


def box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def instance(image: int, kind: int, polygons: Any, area: float, crowd: int = 0) -> dict[str, Any]:
    return {
        "image_id": image, "category_id": kind, "segmentation": polygons, "area": area, "iscrowd": crowd,
    }  # fmt: skip


def annotations() -> dict[str, Any]:
    """Pictures of 100x50: two fit, the others have one fault each."""
    dog, cat, person, bear = 18, 17, 1, 88
    square = box(10, 10, 20, 20)
    good = [instance(1, dog, square, 400), instance(1, cat, box(60, 5, 30, 40), 1200)]
    other = [
        instance(7, bear, [*box(0, 0, 20, 20), *box(40, 0, 20, 20)], 800),
        instance(7, dog, box(70, 20, 20, 20), 400),
        instance(7, dog, box(70, 0, 5, 5), 25),
    ]
    one_class = [instance(2, dog, square, 400), instance(2, person, square, 400)]
    small = [instance(3, dog, square, 400), instance(3, cat, box(0, 0, 10, 10), 100)]
    large = [instance(4, dog, square, 400), instance(4, cat, box(0, 0, 90, 50), 4500)]
    twice = [*good, instance(5, dog, square, 150)]
    twice = [instance(5, *list(of.values())[1:4]) for of in twice]
    crowd = [instance(6, dog, square, 400), instance(6, cat, {"counts": [], "size": []}, 900, 1)]
    names = {dog: "dog", cat: "cat", person: "person", bear: "teddy bear"}
    return {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 50, "width": 100}
            for i in (7, 1, 2, 3, 4, 5, 6)
        ],
        "annotations": [*good, *other, *one_class, *small, *large, *twice, *crowd],
        "categories": [{"id": i, "name": name} for i, name in names.items()],
    }


def coco_folder(folder: Path, listed: dict[str, Any], split: str = "val2017") -> Path:
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(listed))
    for image in listed["images"]:
        pixels = np.arange(image["height"] * image["width"] * 3) % 251
        shape = (image["height"], image["width"], 3)
        shown = Image.fromarray(pixels.astype(np.uint8).reshape(shape))
        shown.save(folder / split / image["file_name"], "PNG")
    return folder


def test_coco_is_read(tmp_path: Path) -> None:
    cases = {case.name: case for case in coco_cases(coco_folder(tmp_path, annotations()))}
    assert set(cases) == {"image_1", "image_7"}
    (first,), (second,) = cases["image_1"].read(), cases["image_7"].read()
    assert str(first.prompt) == "a photo of <cat:cat> and <dog:dog>"
    assert str(second.prompt) == "a photo of <dog:dog> and <teddy_bear:teddy bear>"
    assert set(second.truth) == {"dog", "teddy_bear"} == set(second.masks)
    dog = first.truth["dog"]
    inside = torch.zeros(50, 100, dtype=torch.bool)
    inside[10:30, 10:30] = True
    assert not (inside & ~dog).any() and int(dog.sum()) <= 21 * 21  # a polygon's edge is drawn
    bear = second.truth["teddy_bear"]
    assert bear[10, 10] and bear[10, 50] and not bear[10, 30]
    prompts = cases["image_1"].prompts
    assert len(prompts) == 20 == len({str(p) for p in prompts})
    assert str(prompts[1]) == "a photo of <cat> and <dog> on a beach"


def test_the_protocol_is_the_papers() -> None:
    assert len(CLASSES) == 11 == len(set(CLASSES)) and len(PROMPTS) == 20
    assert (coco.CONCEPTS, coco.PICTURES_PER_PROMPT) == (120, 8)


def test_a_polygon_is_filled_as_its_area_says() -> None:
    """A triangle and a ring of two squares, against the formula for areas."""
    triangle = filled([[10.0, 10.0, 90.0, 10.0, 10.0, 90.0]], (100, 100))
    assert int(triangle.sum()) == pytest.approx(80 * 80 / 2, rel=0.05)
    assert triangle[20, 20] and not triangle[80, 80]
    two = filled([*box(0.0, 0.0, 9.0, 9.0), *box(50.0, 50.0, 19.0, 19.0)], (100, 100))
    assert int(two.sum()) == 10 * 10 + 20 * 20


def test_scenes_are_chosen_evenly_and_always_the_same() -> None:
    def scene(number: int, *names: str) -> Scene:
        return Scene(number, f"{number}.jpg", (9, 9), {name: [[0.0] * 6] for name in names})

    many = [scene(i, "chair", "couch") for i in range(50)]
    few = [scene(50 + i, "dog", "cat") for i in range(4)]
    found = choose([*many, *few], 16)
    assert found == choose([*many, *few], 16) and len({of.image for of in found}) == 8
    assert Counter(name for of in found for name in of.instances) == dict.fromkeys(
        ("chair", "couch", "dog", "cat"), 4
    )
    assert len(choose(few, 120)) == 4


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ({"images": []}, "not COCO's list"),
        ({"images": [], "annotations": [], "categories": []}, "No scene .* fits"),
    ],
)
def test_what_is_not_coco(tmp_path: Path, listed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        coco_cases(coco_folder(tmp_path, listed))
    with pytest.raises(UserError, match=r"annotations/instances_train2017\.json"):
        coco_cases(tmp_path, "train2017")


def test_a_picture_that_is_not_cocos(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, annotations())
    (case, *_) = coco_cases(folder)
    for file in (folder / "val2017").iterdir():
        Image.new("RGB", (90, 50)).save(file, "PNG")
    with pytest.raises(UserError, match=r"90x50 pixels\. Expected COCO's own picture of 100x50"):
        case.read()


def evaluate(tmp_path: Path, *more: str) -> list[str]:
    clip, dino = tmp_path / "clip", tmp_path / "dino"
    if not clip.exists():
        save_clip(clip)
        save_dino(dino)
    given = [f"--clip={clip}", f"--dino={dino}", f"--out={tmp_path / 'out'}"]
    short = ["--count=1", "--sampling-steps=2", "--passes=2", "--steps=2", "--quiet"]
    return ["evaluate", *given, *short, *more]


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    lines = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    return {(line["measure"], line["concept"]): line for line in lines}


def test_dreambench_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With words that the demo model knows; run again, nothing is learned or drawn anew."""
    folder = tmp_path / "data"
    folder.mkdir()
    (dreambench(folder) / "prompts_and_classes.txt").write_text(
        LIST.replace("bear plushie", "circle").replace("a red", "a photo of a red")
    )
    (folder / "rex_toy" / "01.jpg").unlink()
    command = evaluate(tmp_path, f"--dreambench={folder}", "--cases=2", "--mode=fixed")
    assert main(command) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "rex_toy",
        "doll",
        "summary.csv",
        "report.html",
    }
    concepts = ConceptSet.load(out / "rex_toy" / "concepts.safetensors")
    assert concepts.names == ("rex_toy",) and len(concepts.masks) == 1
    whole = rows_of(out / "summary.csv")
    each = [rows_of(out / name / "summary.csv") for name in ("rex_toy", "doll")]
    means = [float(rows["prompt_agreement", ""]["mean"]) for rows in each]
    assert float(whole["prompt_agreement", ""]["mean"]) == pytest.approx(sum(means) / 2, abs=1e-6)
    assert ("mixed", "all") not in whole  # a subject alone is mixed with nothing
    assert "rex_toy/report.html" in (out / "report.html").read_text()
    pictures = sorted(out.rglob("pictures/*.png"))
    times = [file.stat().st_mtime_ns for file in [*pictures, *out.rglob("run/*.safetensors")]]
    assert len(pictures) == 4
    before = (out / "summary.csv").read_bytes()
    assert main([one for one in command if one != "--quiet"]) == 0
    again = [file.stat().st_mtime_ns for file in [*pictures, *out.rglob("run/*.safetensors")]]
    assert again[:4] == times[:4] and (out / "summary.csv").read_bytes() == before
    assert "2 of 2: doll" in capsys.readouterr().out


def test_coco_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rendered scene in COCO's layout, learned under its masks, with the demo model's words."""
    monkeypatch.setattr(coco, "CLASSES", ("star", "circle"))
    monkeypatch.setattr(coco, "PROMPTS", ("a photo of {} on sand",))
    listed = annotations()
    kinds = {"dog": "star", "cat": "circle"}
    for of in listed["categories"]:
        of["name"] = kinds.get(of["name"], of["name"])
    folder = coco_folder(tmp_path / "data", listed)
    assert main(evaluate(tmp_path, f"--coco={folder}", "--mode=given", "--coco-concepts=2")) == 0
    rows = rows_of(tmp_path / "out" / "summary.csv")
    assert ("found", "all") in rows
    concepts = ConceptSet.load(tmp_path / "out" / "image_1" / "concepts.safetensors")
    assert concepts.names == ("star", "circle") and concepts.settings["em"]["mode"] == "given"
