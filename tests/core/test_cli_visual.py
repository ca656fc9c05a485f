"""`learn --visual` and `generate --condition`."""

from pathlib import Path

import pytest
import torch

from em_core.__main__ import main
from em_core.pictures import read_picture
from em_core.runs.concept_set import ConceptSet
from em_core.runs.visual_condition import VisualCondition


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    assert main(["scene", "--seed", "3", "--out", str(folder)]) == 0
    return folder


def learn(scene: Path, out: Path, *more: str, prompt: str | None = None) -> list[str]:
    text = prompt or (scene / "prompt.txt").read_text()
    command = ["learn", "--image", str(scene / "image.png"), "--prompt", text, "--out", str(out)]
    return [*command, "--quiet", *more]


def pictures(out: Path) -> list[torch.Tensor]:
    return [read_picture(file) for file in sorted(out.glob("prompt_*.png"))]


def test_learn_and_draw(scene: Path, tmp_path: Path) -> None:
    """From the start, then from the concepts that it gave; strength 0 is without the condition."""
    first, second = tmp_path / "first", tmp_path / "second"
    brief = ["--visual", "--visual-steps", "2"]
    assert main(learn(scene, first, "--mode", "fixed", "--steps", "1", *brief)) == 0
    concepts = first / "concepts.safetensors"
    assert main(learn(scene, second, "--concepts", str(concepts), *brief)) == 0
    ours = [VisualCondition.load(out / "condition.safetensors") for out in (first, second)]
    for encoder, vectors in ours[0].concepts.vectors["rex"].items():
        assert torch.equal(vectors, ours[1].concepts.vectors["rex"][encoder])
        assert torch.equal(vectors, ConceptSet.load(concepts).vectors["rex"][encoder])
    assert set(ours[0].names) == {"rex", "doll"} and (first / "curves.png").is_file()
    drawn = []
    for number, options in enumerate(
        (
            ["--concepts", str(concepts)],
            ["--condition", str(first / "condition.safetensors"), "--strength", "0"],
            ["--condition", str(first / "condition.safetensors"), "--strength", "2", "--span", "0", "0.8"],
            ["--condition", str(first / "condition.safetensors"), "--reference", str(scene / "image.png"),
             "--reference-masks", str(scene)],
        )
    ):  # fmt: skip
        out = tmp_path / str(number)
        more = ["--prompt", "a photo of <rex> on sand", "--count", "1", "--steps", "2"]
        assert main(["generate", *options, *more, "--out", str(out)]) == 0
        drawn.append(pictures(out))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert drawn[3][0].shape == drawn[0][0].shape


def test_vico_and_what_is_refused(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (scene / "prompt.txt").read_text()
    start = text.index("<rex")
    only = f"a photo of {text[start : text.index('>', start) + 1]}"
    out = tmp_path / "vico"
    options = ["--visual", "vico", "--visual-steps", "1"]
    assert main(learn(scene, out, *options, prompt=only)) == 0
    condition = VisualCondition.load(out / "condition.safetensors")
    assert condition.settings.own_prompts and condition.names == ("rex",)
    for command, words in (
        (learn(scene, tmp_path / "a", *options), "of one concept"),
        (learn(scene, tmp_path / "b", "--concepts", "x.safetensors"), "x.safetensors"),
        (learn(scene, tmp_path / "c", "--visual", "--joint", "lora"), "not learned in one run"),
        (["generate", "--prompt", "<rex>", "--out", str(tmp_path)], "Nothing to draw"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err
