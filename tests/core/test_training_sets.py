"""Data sets for other trainers: names, values and sizes as their reading code wants them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_core import Example, UserError
from em_core.__main__ import main
from em_core.errors import Notice
from em_core.exchange import layouts
from em_core.exchange.datasets import Choices, crop_of, painted_out, training_pictures
from em_core.exchange.layouts import LAYOUTS, read_words, save_dataset
from em_core.masks.given import looks_inverted
from em_core.pictures import save_image, save_mask, to_image
from em_core.prompts import ConceptPrompt

WORDS = {"rex": "sks", "doll": "ohwx doll"}


def example(seed: int = 0) -> Example:
    """A picture of two concepts, whose masks are boxes."""
    picture = torch.rand(3, 40, 64, generator=torch.Generator().manual_seed(seed))
    rex, doll = (torch.zeros(40, 64, dtype=torch.bool) for _ in range(2))
    rex[4:20, 8:24], doll[10:34, 36:60] = True, True
    prompt = ConceptPrompt.parse("a photo of <rex:red dog> and  <doll:old doll>, on grass")
    return Example(picture, prompt, {"rex": rex, "doll": doll})


def write(folder: Path, layout: str, **choices: bool) -> Example:
    one = example()
    save_dataset([one], [one.masks], Choices(WORDS, **choices), layout, folder)
    return one


def names(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def values(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


SIDE_BY_SIDE = {"images/0001.png", "images/0001.txt", "masks/0001.png", "dataset.toml"}


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("OneTrainer", {"0001.png", "0001.txt", "0001-masklabel.png"}),
        ("sd-scripts (masks)", SIDE_BY_SIDE),
        ("sd-scripts (alpha)", {"images/0001.png", "images/0001.txt", "dataset.toml"}),
        ("musubi-tuner", SIDE_BY_SIDE),
        ("diffusion-pipe", SIDE_BY_SIDE),
        ("ComfyUI", SIDE_BY_SIDE - {"dataset.toml"}),
    ],
)
def test_layouts(tmp_path: Path, layout: str, files: set[str]) -> None:
    folder = tmp_path / "sets" / "x"
    one = write(folder, layout)
    assert names(folder) == files and names(tmp_path) == {f"sets/x/{name}" for name in files}
    (picture,) = (folder / n for n in files if n.endswith("0001.png") and "mask" not in n)
    pixels = values(picture)
    assert (pixels[..., :3] == np.asarray(to_image(one.picture))).all()
    whole = (one.masks["rex"] | one.masks["doll"]).numpy()
    masks = [values(folder / n)[..., 0] for n in files if "mask" in n]
    masks += [pixels[..., 3]] if layout == "sd-scripts (alpha)" else []
    (mask,) = masks
    assert (mask == whole * np.uint8(255)).all() and mask.shape == pixels.shape[:2]
    caption = picture.with_suffix(".txt").read_text(encoding="utf-8")
    assert caption == "a photo of sks and ohwx doll, on grass"


def test_configurations(tmp_path: Path) -> None:
    """Each names folders that are there, under the keys that its trainer reads."""
    tomllib = pytest.importorskip("tomllib")

    def read(layout: str) -> dict:
        folder = tmp_path / "a \u00e9" / layout
        write(folder, layout)
        found = tomllib.loads((folder / "dataset.toml").read_text(encoding="utf-8"))
        for text in str(found).replace("'", '"').split('"'):
            assert not text.startswith("/") or text.endswith("cache") or Path(text).is_dir(), text
        return dict(found)

    (dataset,) = read("sd-scripts (masks)")["datasets"]
    assert (dataset["resolution"], dataset["enable_bucket"]) == (64, True)
    (subset,) = dataset["subsets"]
    assert subset["caption_extension"] == ".txt" and subset["image_dir"].endswith("/images")
    assert subset["conditioning_data_dir"].endswith("/masks") and "alpha_mask" not in subset
    (subset,) = read("sd-scripts (alpha)")["datasets"][0]["subsets"]
    assert subset["alpha_mask"] is True and "conditioning_data_dir" not in subset
    found = read("musubi-tuner")
    assert found["general"]["resolution"] == [64, 64]
    assert found["datasets"][0]["image_directory"].endswith("/images")
    found = read("diffusion-pipe")
    assert found["resolutions"] == [64] and found["frame_buckets"] == [1]
    assert found["directory"][0]["mask_path"].endswith("/masks")


def test_each_concept_by_itself(tmp_path: Path) -> None:
    """Cut to it, with the other painted over, under a caption that names it alone."""
    one = write(tmp_path / "x", "OneTrainer", apart=True, crop=True, paint_out=True)
    ends = (".png", ".txt", "-masklabel.png")
    assert names(tmp_path / "x") == {f"{n}{e}" for n in ("0001-rex", "0002-doll") for e in ends}
    assert (tmp_path / "x" / "0001-rex.txt").read_text() == "a photo of sks"
    assert (tmp_path / "x" / "0002-doll.txt").read_text() == "a photo of ohwx doll"
    mask = values(tmp_path / "x" / "0001-rex-masklabel.png")[..., 0] > 0
    assert mask.shape == (20, 20) and mask.sum() == 16 * 16  # a margin of 2 on each side
    rows, columns = crop_of(one.masks["rex"])
    assert (rows, columns) == (slice(2, 22), slice(6, 26))


def test_what_is_painted_over() -> None:
    one = example()
    rex, doll = one.masks["rex"], one.masks["doll"]
    found = painted_out(one.picture, [doll], rex)
    assert torch.equal(found[:, ~doll], one.picture[:, ~doll])
    rest = one.picture[:, ~(rex | doll)].mean(dim=1)
    torch.testing.assert_close(found[:, doll], rest[:, None].expand(-1, int(doll.sum())))
    assert torch.equal(painted_out(one.picture, [rex], rex), one.picture)  # nothing of its own


def test_masks_that_cannot_be_used() -> None:
    one = example()
    empty = torch.zeros_like(one.masks["rex"])
    with pytest.raises(UserError, match="Picture 1 has no mask for doll"):
        training_pictures([one], [{"rex": empty}], Choices({}))
    with pytest.raises(
        UserError, match=r"the mask of doll has the wrong size. Expected 64x40, got 8x4"
    ):
        training_pictures([one], [{"rex": empty, "doll": empty[:4, :8]}], Choices({}))
    with (
        pytest.raises(UserError, match="All masks are empty"),
        pytest.warns(Notice, match="is empty, and left out"),
    ):
        training_pictures([one], [{"rex": empty, "doll": empty}], Choices({}))
    with pytest.warns(Notice, match="Picture 1: the mask of doll is empty, and left out"):
        found = training_pictures(
            [one], [{"rex": one.masks["rex"], "doll": empty}], Choices({}, apart=True)
        )
    assert [picture.caption for picture in found] == ["a photo of rex"]
    with pytest.warns(Notice, match="the mask of rex covers the border and not the middle"):
        masks = {"rex": ring(40, 64), "doll": one.masks["doll"]}
        training_pictures([one], [masks], Choices({}))


def ring(height: int, width: int) -> torch.Tensor:
    """What an inverted mask of something in the middle covers."""
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[6:-6, 6:-6] = False
    return mask


def test_inverted_masks_are_told_from_others() -> None:
    whole = torch.ones(40, 64)
    assert looks_inverted(ring(40, 64).float())
    for other in (whole, 1 - whole, (~ring(40, 64)).float(), example().masks["rex"].float()):
        assert not looks_inverted(other)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", "OneTrainer")
    before = {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir()}

    def full(content: str) -> Callable[[Path], None]:
        def fail(path: Path) -> None:
            raise OSError(28, "No space left on device")

        return fail

    monkeypatch.setattr(layouts, "text", full)
    for target in ("x", "new"):
        with pytest.raises(
            UserError, match=r"Could not write .*0001\.txt.*No space.* Nothing is left"
        ):
            write(tmp_path / target, "OneTrainer")
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "x").iterdir()} == before


def test_a_set_that_is_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "x", "ComfyUI")
    write(tmp_path / "x", "OneTrainer")
    assert names(tmp_path) == {"x/0001.png", "x/0001.txt", "x/0001-masklabel.png"}


def test_words_of_captions() -> None:
    assert read_words("rex: red red dog, doll: dog", ["rex", "doll"]) == {
        "rex": "red red dog",
        "doll": "dog",
    }
    with pytest.raises(UserError, match="Bad trigger words 'max: x'"):
        read_words("max: x", ["rex", "doll"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = example()
    save_image(tmp_path / "p.png", to_image(one.picture))
    for name, mask in one.masks.items():
        save_mask(tmp_path / f"mask_{name}.png", mask)
    given = ["dataset", "--image", str(tmp_path / "p.png"), "--prompt", str(one.prompt),
             "--out", str(tmp_path / "out")]  # fmt: skip
    made = [*given, "--layout", "OneTrainer", "--masks", str(tmp_path), "--words", "rex: sks"]
    assert main(made) == 0
    assert "1 pictures for OneTrainer" in capsys.readouterr().out
    caption = "a photo of sks and doll, on grass"
    assert (tmp_path / "out" / "0001.txt").read_text(encoding="utf-8") == caption
    assert main(made) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*made, "--overwrite"]) == 0
    shutil.rmtree(tmp_path / "out")
    assert main([*given, "--layout", "ComfyUI"]) == 2
    assert "has no mask for rex, doll" in capsys.readouterr().err
    assert set(LAYOUTS) == set(layouts.USES)
