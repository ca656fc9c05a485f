"""`python -m em_core refine`."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_core.__main__ import main
from em_core.masks.crf import DEMO, MaskRefiner, labels
from em_core.masks.measures import iou
from em_core.pictures import read_mask, read_picture


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A picture and speckled masks of it, in three image modes."""
    pixels = np.full((64, 64, 3), (50, 150, 50), dtype=np.uint8)
    pixels[10:40, 10:40] = (200, 40, 40)
    pixels[36:60, 44:60] = (40, 40, 200)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    speckles = np.random.default_rng(0).random((64, 64)) < 0.05
    red, blue = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    red[10:40, 10:40], blue[36:60, 44:60] = True, True
    Image.fromarray((red ^ speckles).astype(np.uint8) * 255, "L").save(tmp_path / "mask_red.png")
    rgb = np.repeat(np.where(blue ^ speckles, 128, 127)[..., None], 3, axis=2).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "mask_blue.png")
    rgba = np.dstack([rgb, np.zeros((64, 64), np.uint8)])
    Image.fromarray(rgba).resize((32, 32), Image.Resampling.NEAREST).save(
        tmp_path / "mask_small.png"
    )
    return tmp_path


def refine(scene: Path, *masks: str, more: tuple[str, ...] = ("--preset", "demo")) -> int:
    files = [str(scene / name) for name in masks]
    image, out = str(scene / "photo.png"), str(scene / "out")
    return main(["refine", "--image", image, "--mask", *files, "--out", out, *more])


def truth(rows: slice, columns: slice) -> torch.Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def test_refined_masks_have_their_names(scene: Path) -> None:
    assert refine(scene, "mask_red.png", "mask_blue.png") == 0
    assert {file.name for file in (scene / "out").iterdir()} == {"mask_red.png", "mask_blue.png"}
    red, blue = (read_mask(scene / "out" / f"mask_{name}.png") for name in ("red", "blue"))
    assert float(iou(red, truth(slice(10, 40), slice(10, 40)))) > 0.98
    assert float(iou(blue, truth(slice(36, 60), slice(44, 60)))) > 0.98


def test_the_command_equals_the_library(scene: Path) -> None:
    refine(scene, "mask_red.png", "mask_blue.png", more=("--preset", "demo", "--iterations", "3"))
    masks = torch.stack([read_mask(scene / f"mask_{name}.png") for name in ("red", "blue")])
    settings = replace(DEMO, iterations=3)
    expected = labels(MaskRefiner(read_picture(scene / "photo.png"), settings)(masks))
    for name, mask in zip(("red", "blue"), expected, strict=True):
        assert torch.equal(read_mask(scene / "out" / f"mask_{name}.png"), mask)


def test_masks_of_another_size_and_alone(scene: Path) -> None:
    more = ("--preset", "demo", "--alone", "--working-size", "48")
    assert refine(scene, "mask_small.png", "mask_red.png", more=more) == 0
    small = read_mask(scene / "out" / "mask_small.png")
    assert float(iou(small, truth(slice(36, 60), slice(44, 60)))) > 0.8


def test_backends_agree(scene: Path) -> None:
    pytest.importorskip("pydensecrf", reason="pydensecrf is not installed")
    refine(scene, "mask_red.png", "mask_blue.png")
    ours = (scene / "out" / "mask_red.png").read_bytes()
    refine(
        scene, "mask_red.png", "mask_blue.png", more=("--preset", "demo", "--backend", "pydensecrf")
    )
    assert (scene / "out" / "mask_red.png").read_bytes() == ours


@pytest.mark.parametrize(
    ("masks", "more", "message"),
    (
        (("mask_none.png",), (), "No file"),
        (("mask_red.png", "mask_red.png"), (), "different names"),
        (("mask_red.png",), ("--device", "nowhere"), "No device 'nowhere'"),
        (("broken.png",), (), "not a readable picture"),
    ),
)
def test_bad_input_writes_nothing(
    scene: Path,
    masks: tuple[str, ...],
    more: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (scene / "broken.png").write_bytes(b"\x89PNG no more")
    assert refine(scene, *masks, more=more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (scene / "out").exists()


def test_inputs_are_not_overwritten(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (scene / "mask_red.png").read_bytes()
    image, mask = str(scene / "photo.png"), str(scene / "mask_red.png")
    assert main(["refine", "--image", image, "--mask", mask, "--out", str(scene)]) == 2
    assert "another --out folder" in capsys.readouterr().err
    assert (scene / "mask_red.png").read_bytes() == before


def test_missing_backend(
    scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    assert refine(scene, "mask_red.png", more=("--backend", "pydensecrf")) == 2
    assert "pip install pydensecrf2 (the extra 'pydensecrf')" in capsys.readouterr().err
    assert not (scene / "out").exists()
