"""The command `evaluate` on the demo model, with encoders of random weights, from files to report."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from scores import evaluation
from tiny_encoders import (
    MISSING,
    InTensors,
    bytes_of,
    save_backbone,
    save_clip,
    save_dino,
    without_downloads,
)
from torch import Tensor

from em_core.__main__ import main
from em_core.commands.common import load_host
from em_core.errors import UserError
from em_core.evaluate.album import name_of
from em_core.evaluate.crops import masked_crop
from em_core.evaluate.encoders import Instruments
from em_core.evaluate.evaluation import evaluate
from em_core.evaluate.finding import find_concepts
from em_core.evaluate.page import page
from em_core.evaluate.pretrained import Clip, Dino
from em_core.evaluate.summary import summarise
from em_core.evaluate.task import Task, in_words, read_prompts
from em_core.pictures import read_mask, read_picture, to_image
from em_core.presets import em_settings
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet

PROMPTS = "# drawn first\na photo of <rex> and <doll> on sand\n\na photo of <doll> on snow\n"
FILES = {"summary.csv", "pictures.csv", "prompts.csv", "sheet.png", "report.html"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene, concepts that were learned from it in a few steps, encoders, prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    scene = folder / "scene"
    assert main(["scene", "--seed", "3", "--set", "A", "--out", str(scene)]) == 0
    prompt = (scene / "prompt.txt").read_text().strip()
    learn = [
        "--image",
        str(scene / "image.png"),
        "--prompt",
        prompt,
        "--steps",
        "2",
        "--mode",
        "fixed",
        "--quiet",
    ]
    assert main(["learn", *learn, "--out", str(folder / "learned")]) == 0
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def command(made: Path, out: Path, *more: str) -> list[str]:
    """The command with few steps; later options override earlier ones."""
    given = {
        "concepts": made / "learned" / "concepts.safetensors", "prompts": made / "prompts.txt",
        "image": made / "scene" / "image.png", "clip": made / "clip", "dino": made / "dino", "out": out,
        "count": 3, "sampling-steps": 4, "passes": 2,
    }  # fmt: skip
    return ["evaluate", "--quiet", *(f"--{k}={v}" for k, v in given.items()), *more]


@pytest.fixture(scope="module")
def evaluated(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    assert main(command(made, out)) == 0
    return out


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def crop_of(out: Path, prompt: int, seed: int, name: str) -> Tensor | None:
    """A concept's crop from the files that were written; None if nothing was found."""
    stem = name_of(prompt, seed)
    mask = read_mask(out / "masks" / f"{stem}_{name}.png")
    picture = read_picture(out / "pictures" / f"{stem}.png")
    return masked_crop(picture, mask) if mask.any() else None


def references(made: Path) -> dict[str, Tensor]:
    """From the picture and the mask files that learning wrote."""
    picture = read_picture(made / "scene" / "image.png")
    masks = {n: read_mask(made / "learned" / f"mask_{n}.png") for n in ("rex", "doll")}
    return {name: masked_crop(picture, mask) for name, mask in masks.items()}


def test_every_file_is_there(evaluated: Path) -> None:
    names = {path.name for path in evaluated.iterdir()}
    assert names == FILES | {"pictures", "masks", "drawn.json"}
    assert len(list((evaluated / "pictures").glob("*.png"))) == 2 * 3
    assert len(list((evaluated / "masks").glob("*.png"))) == (2 + 1) * 3


@torch.no_grad()
def test_the_numbers_are_torchmetrics_of_the_files(made: Path, evaluated: Path) -> None:
    """Prompt agreement and CLIP's identity by CLIPScore, called by hand on what was written."""
    pytest.importorskip("torchmetrics", reason=MISSING)
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    clip = Clip.load(made / "clip")
    model, texts = (
        InTensors(clip),
        ["a photo of square and circle on sand", "a photo of circle on snow"],
    )
    own = references(made)
    for row in rows_of(evaluated / "pictures.csv"):
        prompt, seed = int(row["prompt"]) - 1, int(row["seed"])
        picture = bytes_of(read_picture(evaluated / row["file"]))
        score = _clip_score_update([picture], [texts[prompt]], model, clip.processor)[0]  # type: ignore[arg-type]
        assert 100 * float(row["prompt_agreement"]) == pytest.approx(float(score), abs=1e-3)
        for name in ("rex", "doll"):
            crop = crop_of(evaluated, prompt, seed, name) if row[f"found:{name}"] == "1.0" else None
            if crop is None:
                assert (
                    row[f"clip_image:{name}"] == row[f"dino:{name}"] == row[f"mixed:{name}"] == ""
                )
                continue
            pair = [bytes_of(crop)], [bytes_of(own[name])]
            score = _clip_score_update(*pair, model, clip.processor)[0]  # type: ignore[arg-type]
            assert 100 * float(row[f"clip_image:{name}"]) == pytest.approx(float(score), abs=2e-3)


def test_identity_mixing_and_diversity_by_hand(made: Path, evaluated: Path) -> None:
    """By DINO's vectors of the files, with loops."""
    dino, own = Dino.load(made / "dino"), references(made)
    known = {name: dino.images([crop])[0] for name, crop in own.items()}
    between = float(known["rex"] @ known["doll"])
    seen = 0
    for row in rows_of(evaluated / "pictures.csv"):
        prompt, seed = int(row["prompt"]) - 1, int(row["seed"])
        asked = [("rex", "doll"), ("doll",)][prompt]
        table = {}
        for name in asked:
            crop = crop_of(evaluated, prompt, seed, name)
            vector = torch.zeros(16) if crop is None else dino.images([crop])[0]
            table[name] = {other: float(vector @ known[other]) for other in known}
            if crop is not None:
                other = "doll" if name == "rex" else "rex"
                assert float(row[f"dino:{name}"]) == pytest.approx(table[name][name], abs=1e-5)
                assert (row[f"mixed:{name}"] == "1.0") == (table[name][other] > table[name][name])
                seen += 1
        if prompt == 0:
            wrong = sum(
                (table[a][b] - (1 if a == b else between)) ** 2 for a in asked for b in asked
            )
            assert float(row["detect_and_compare"]) == pytest.approx(1 - wrong, abs=1e-5)
        else:
            assert row["detect_and_compare"] == ""
    assert seen > 4
    for number, line in enumerate(rows_of(evaluated / "prompts.csv")):
        files = [evaluated / "pictures" / f"{name_of(number, seed)}.png" for seed in range(3)]
        a, b, c = dino.images([read_picture(file) for file in files])
        expected = 1 - float(a @ b + a @ c + b @ c) / 3
        assert float(line["1_minus_dino"]) == pytest.approx(expected, abs=1e-5)


def test_pictures_are_those_of_the_model(made: Path, evaluated: Path) -> None:
    """The prompt's pictures by the host's own `generate`."""
    host = load_host("demo")
    concepts = ConceptSet.load(made / "learned" / "concepts.safetensors")
    for seed in (0, 2):
        drawn = host.generate("a photo of <doll> on snow", concepts, [seed], steps=4)[0]
        found = read_picture(evaluated / "pictures" / f"{name_of(1, seed)}.png")
        assert to_image(drawn).tobytes() == to_image(found).tobytes()


def test_a_stopped_evaluation_goes_on_to_the_same_files(
    made: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the third picture, then run again; nothing is drawn twice."""
    from em_core.hosts.diffusers import DiffusersHost

    drawn: list[str] = []
    real = DiffusersHost.generate

    def counting(self: Any, prompt: Any, *rest: Any) -> Tensor:
        drawn.append(str(prompt))
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return real(self, prompt, *rest)

    monkeypatch.setattr(DiffusersHost, "generate", counting)
    assert main(command(made, tmp_path)) == 130
    assert not (tmp_path / "report.html").exists()
    assert main(command(made, tmp_path)) == 0
    assert len(drawn) == 4 + 3
    for name in FILES - {"report.html"} | {f"pictures/{name_of(1, 2)}.png"}:
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes(), name
    before = (tmp_path / "report.html").read_bytes()
    assert main(command(made, tmp_path)) == 0 and len(drawn) == 7
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize("change", ["prompts", "steps", "concepts"])
def test_pictures_of_something_else_are_not_taken(
    made: Path, evaluated: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    more = ["--sampling-steps=7"]
    if change == "prompts":
        (tmp_path / "other.txt").write_text("a photo of <doll> on sand")
        more = [f"--prompts={tmp_path / 'other.txt'}"]
    if change == "concepts":
        file = made / "learned" / "concepts.safetensors"
        concepts = ConceptSet.load(file)
        for vector in concepts.vectors["rex"].values():
            vector[0, 0] += 1e-3
        concepts.save(tmp_path / "other.safetensors")
        more = [f"--concepts={tmp_path / 'other.safetensors'}"]
    assert main(command(made, out, *more)) == 2
    assert "holds pictures that were drawn from other concepts" in capsys.readouterr().err
    (out / "drawn.json").write_text("{")
    assert main(command(made, out)) == 2


def test_without_pictures_and_with_lpips(
    made: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what can be measured is; LPIPS takes DINO's place, by torchmetrics' own class."""
    pytest.importorskip("torchmetrics", reason=MISSING)
    without_downloads(monkeypatch)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    arguments = [a for a in command(made, out) if not a.startswith(("--image", "--clip"))]
    backbone = save_backbone(tmp_path / "alex", "alex")
    assert main([*arguments, f"--lpips={backbone}"]) == 0
    measures = {row["measure"] for row in rows_of(out / "summary.csv")}
    assert measures == {"found", "lpips"}
    lpips = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    files = [out / "pictures" / f"{name_of(1, seed)}.png" for seed in range(3)]
    a, b, c = (read_picture(file)[None] for file in files)
    with torch.no_grad():
        expected = sum(float(lpips(*pair)) for pair in ((a, b), (a, c), (b, c))) / 3
    assert float(rows_of(out / "prompts.csv")[1]["lpips"]) == pytest.approx(expected, rel=1e-4)


class Links(HTMLParser):
    """What a page would fetch, its tags, and the text in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = dict(attrs)
        self.sources += [str(named[name]) for name in ("src", "srcset", "data") if name in named]
        self.links += [str(named["href"])] if "href" in named else []
        assert not any(name.startswith("on") or name == "style" for name in named)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_report_opens_offline_and_runs_nothing(evaluated: Path) -> None:
    links = Links()
    links.feed((evaluated / "report.html").read_text(encoding="utf-8"))
    assert links.sources and all(s.startswith("data:image/jpeg;base64,") for s in links.sources)
    assert links.links and all((evaluated / link).is_file() for link in links.links)
    assert not links.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert "a photo of <rex> and <doll> on sand" in links.text


def test_the_report_escapes_what_it_is_given(made: Path) -> None:
    """A file's name and the words of a prompt that look like HTML."""
    of = evaluation()
    bad = "<img src=x onerror=alert(1)>\"'&"
    from PIL import Image

    text = page(bad, summarise([of]), of, lambda *_: Image.new("RGB", (8, 8)), {bad: bad})
    links = Links()
    links.feed(text)
    assert links.text.count(bad) == 4  # the title twice, and the fact's name and value
    assert all(source.startswith("data:") for source in links.sources)


def test_a_picture_of_one_colour_shows_nothing(made: Path) -> None:
    host = load_host("demo")
    concepts = ConceptSet.load(made / "learned" / "concepts.safetensors")
    masks = em_settings(host.identity().family).masks
    prompt = ConceptPrompt.parse("a photo of <rex>")
    found = find_concepts(host, torch.full((3, 64, 64), 0.3), prompt, concepts, masks)
    assert list(found) == ["rex"] and not found["rex"].any()


def test_prompts_in_words(made: Path) -> None:
    from dataclasses import replace

    from em_core.prompts import Concept

    concepts = ConceptSet.load(made / "learned" / "concepts.safetensors")
    prompt = ConceptPrompt.parse("<rex> and <doll:old doll> on <x>")
    told = (Concept("rex", "square"), Concept("x", "embedding:file"))
    assert in_words(prompt, replace(concepts, concepts=told)) == "square and old doll on object"
    assert [str(p) for p in read_prompts(PROMPTS)] == [
        "a photo of <rex> and <doll> on sand",
        "a photo of <doll> on snow",
    ]


def test_seeds_are_asked_for_once(made: Path) -> None:
    concepts = ConceptSet.load(made / "learned" / "concepts.safetensors")
    prompts, with_clip = read_prompts(PROMPTS), Instruments(Clip.load(made / "clip"))
    for seeds in ((), (1, 1)):
        with pytest.raises(UserError, match="Bad seeds"):
            Task(concepts, prompts, seeds, with_clip)
    watched: list[tuple[int, int]] = []
    task = Task(concepts, prompts, (7,), with_clip)
    drawn = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    of = evaluate(task, lambda *_: drawn, lambda *_: {}, lambda *n: watched.append(n))
    assert watched == [(1, 2), (2, 2)] and of.diversity == ({}, {})


BAD = {
    "a photo of a circle": "Prompt 1 marks no concept",
    "a photo of <rex>\n<max> on sand": "Prompt 2 marks <max>.*<rex>, <doll>",
    "a photo of (<rex>:1.3)": "Weights such as",
    "a photo of <rex> on venus": "does not know the word 'venus'",
    "# nothing": "No prompt to draw",
    "<rex": "Unbalanced",
}


@pytest.mark.parametrize("prompts", BAD)
def test_bad_prompts_before_anything_is_drawn(
    made: Path, tmp_path: Path, prompts: str, capsys: pytest.CaptureFixture
) -> None:
    import re

    (tmp_path / "p.txt").write_text(prompts)
    out = tmp_path / "out"
    assert main(command(made, out, f"--prompts={tmp_path / 'p.txt'}")) == 2
    assert re.search(BAD[prompts], capsys.readouterr().err)
    assert not (out / "pictures").exists()


def test_bad_input(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def said(arguments: list[str]) -> str:
        assert main(arguments) == 2
        assert not (tmp_path / "out" / "pictures").exists()
        return capsys.readouterr().err

    whole = command(made, tmp_path / "out")

    def without(*names: str) -> list[str]:
        return [a for a in whole if not a.startswith(tuple(f"--{name}=" for name in names))]

    assert "nothing to measure with" in said(without("clip", "dino"))
    assert "--concepts needs --prompts" in said(without("prompts"))
    assert "Could not read" in said([*whole, f"--prompts={tmp_path / 'none.txt'}"])
    image = str(made / "scene" / "image.png")
    assert "Expected the 1 that the concepts" in said([*whole, "--image", image, image])
    assert "Bad number of mask folders" in said([*whole, "--masks", "a", "b"])
    read = to_image(read_picture(image))
    read.crop((0, 0, 64, 40)).save(tmp_path / "part.png")
    assert "not the one that the concepts" in said([*whole, f"--image={tmp_path / 'part.png'}"])
    (tmp_path / "bench").mkdir()
    bench = ["evaluate", f"--dreambench={tmp_path / 'bench'}", f"--clip={made / 'clip'}",
             f"--out={tmp_path / 'out'}", "--quiet"]  # fmt: skip
    assert "prompts_and_classes.txt" in said(bench)
    assert "belong to --concepts" in said([*bench, "--prompts=x.txt"])
    assert "no masks" in said([*bench, "--mode=given"])


def test_given_masks_are_what_is_compared_with(made: Path, evaluated: Path, tmp_path: Path) -> None:
    """Those of a folder in place of those that learning found."""
    out, masks = tmp_path / "out", tmp_path / "masks"
    shutil.copytree(evaluated, out)
    masks.mkdir()
    for mine, theirs in (("rex", "doll"), ("doll", "rex")):
        shutil.copy(made / "learned" / f"mask_{theirs}.png", masks / f"mask_{mine}.png")
    assert main(command(made, out, f"--masks={masks}")) == 0
    dino, own = Dino.load(made / "dino"), references(made)
    row = next(r for r in rows_of(out / "pictures.csv") if r["found:doll"] == "1.0")
    crop = crop_of(out, int(row["prompt"]) - 1, int(row["seed"]), "doll")
    assert crop is not None
    expected = float(dino.images([crop])[0] @ dino.images([own["rex"]])[0])
    assert float(row["dino:doll"]) == pytest.approx(expected, abs=1e-5)


def test_the_key_is_of_what_acts(evaluated: Path) -> None:
    assert len(json.loads((evaluated / "drawn.json").read_text())["key"]) == 64
