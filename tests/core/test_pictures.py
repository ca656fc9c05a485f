"""Pictures from disk, with every quirk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from em_core.errors import UserError
from em_core.examples import Example, fitted_size
from em_core.masks.resizing import cut, resize
from em_core.pictures import read_mask, read_picture, save_mask, to_image
from em_core.prompts import Concept
from em_core.show.drawing import outline, overlay, sheet

RGB = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)


def test_rgb_round_trip(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    assert picture.shape == (3, 12, 9)
    assert np.array_equal(np.asarray(to_image(picture)), RGB)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.full((12, 9, 1), 255, np.uint8)
    alpha[:6] = 0
    Image.fromarray(np.concatenate([RGB, alpha], axis=2)).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    assert torch.equal(picture[:, :6], torch.ones(3, 6, 9))
    assert np.array_equal(np.asarray(to_image(picture))[6:], RGB[6:])


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    expected = torch.from_numpy(grey.astype(np.float32) / 65535)
    torch.testing.assert_close(picture, expected.expand(3, 8, 8))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(RGB).convert(mode).save(file)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(np.asarray(to_image(read_picture(file))), expected)


def test_a_turned_photo_is_turned_back(tmp_path: Path) -> None:
    """EXIF orientation 6: the camera was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(to_image(read_picture(tmp_path / "x.png"))), np.rot90(RGB, -1))


def test_a_picture_with_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    monkeypatch.setattr("em_core.pictures.MAX_PIXELS", 12 * 9 - 1)
    with pytest.raises(UserError, match="has 9x12 pixels"):
        read_picture(tmp_path / "x.png")


def test_an_example_from_a_file(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.png")
    example = Example.read(str(tmp_path / "x.png"), "a photo of <rex:old dog> on <shore>")
    assert np.array_equal(np.asarray(to_image(example.picture)), RGB)
    assert example.prompt.concepts == (Concept("rex", "old dog"), Concept("shore"))
    assert not example.masks and not example.truth
    with pytest.raises(UserError, match="No concept in the prompt"):
        Example.read(tmp_path / "x.png", "a photo of a dog")
    with pytest.raises(UserError, match="No file"):
        Example.read(tmp_path / "y.png", "a photo of <rex:dog>")


MASK = np.zeros((8, 8), np.uint8)
MASK[2:5, 3:] = 255
NOISE = np.random.default_rng(2).integers(0, 256, (8, 8), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "I;16", "1"])
def test_masks_are_where_they_are_light(tmp_path: Path, mode: str) -> None:
    """With an alpha that is opaque throughout, too."""
    if mode == "I;16":
        image = Image.fromarray(MASK.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(MASK).convert(mode)
    file = tmp_path / ("m.tif" if mode == "CMYK" else "m.png")
    image.save(file)
    assert np.array_equal(read_mask(file).numpy(), MASK > 127)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("colours", ["black", "white", "noise"])
def test_masks_are_where_they_are_opaque(tmp_path: Path, mode: str, colours: str) -> None:
    """As cut-outs are saved, whatever the colours are, which editors keep under what is transparent."""
    grey = {"black": np.zeros_like(MASK), "white": np.full_like(MASK, 255), "noise": NOISE}[colours]
    bands = [grey] * (3 if mode == "RGBA" else 1)
    Image.merge(mode, [Image.fromarray(band) for band in (*bands, MASK)]).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), MASK > 127)


@pytest.mark.parametrize("alpha", [0, 120, 180, 255])
def test_alpha_that_tells_nothing_apart_does_not_count(tmp_path: Path, alpha: int) -> None:
    """Equal everywhere but for noise, on one side of one half."""
    noisy = np.clip(alpha + NOISE.astype(int) % 7, 0, 255).astype(np.uint8)
    bands = [Image.fromarray(band) for band in (MASK, MASK, MASK, noisy)]
    Image.merge("RGBA", bands).save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), MASK > 127)


def test_a_transparent_palette_colour_is_outside(tmp_path: Path) -> None:
    image = Image.fromarray(MASK // 255).convert("P")
    image.putpalette([10, 200, 30, 200, 10, 30])
    image.save(tmp_path / "m.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), MASK > 127)


@pytest.mark.parametrize(
    ("colour", "light"),
    [((255, 255, 0), True), ((0, 255, 0), True), ((0, 255, 255), True), ((200, 90, 200), True),
     ((255, 0, 0), False), ((0, 0, 255), False), ((128, 0, 0), False)],
)  # fmt: skip
def test_coloured_masks_count_by_their_luminance(
    tmp_path: Path, colour: tuple, light: bool
) -> None:
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B. What is light nowhere is refused, not taken for empty."""
    assert (np.dot(colour, (0.299, 0.587, 0.114)) > 127.5) == light
    picture = (MASK[..., None] // 255) * np.array(colour, np.uint8)
    Image.fromarray(picture).save(tmp_path / "m.png")
    if light:
        assert np.array_equal(read_mask(tmp_path / "m.png").numpy(), MASK > 127)
    else:
        with pytest.raises(UserError, match="has no light part: its lightest value is"):
            read_mask(tmp_path / "m.png")


def test_an_empty_mask_is_empty(tmp_path: Path) -> None:
    """Also after JPEG, which leaves a little light in what is black."""
    Image.fromarray(NOISE % 9).save(tmp_path / "m.png")
    assert not read_mask(tmp_path / "m.png").any()


@pytest.mark.parametrize("read", [read_picture, read_mask])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, read, value: float) -> None:
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "x.tif")
    read(tmp_path / "x.tif")
    grey[3, 4] = value
    Image.fromarray(grey).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif has values that are not finite"):
        read(tmp_path / "x.tif")


@pytest.mark.parametrize("kind", ["labels", "floats"])
def test_masks_of_zeros_and_ones(tmp_path: Path, kind: str) -> None:
    mask = np.zeros((8, 8), np.uint8 if kind == "labels" else np.float32)
    mask[2:5, 3:] = 1
    file = tmp_path / ("m.png" if kind == "labels" else "m.tif")
    Image.fromarray(mask).save(file)
    assert np.array_equal(read_mask(file).numpy(), mask > 0)


@pytest.mark.parametrize(
    ("values", "white"), [(np.uint16(200), 65535), (np.float32(0.3), 1), (np.float32(200), 255)]
)
def test_dark_greys_stay_dark(tmp_path: Path, values: np.generic, white: int) -> None:
    file = tmp_path / ("x.png" if white == 65535 else "x.tif")
    Image.fromarray(np.full((8, 8), values)).save(file)
    assert float(read_picture(file)[0, 0, 0]) == pytest.approx(float(values) / white)


def test_masks_are_written_at_the_pictures_size(tmp_path: Path) -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    save_mask(tmp_path / "m.png", cut(resize(mask.float(), (32, 16), "mask")))
    again = read_mask(tmp_path / "m.png")
    assert again.shape == (32, 16)
    assert set(np.asarray(Image.open(tmp_path / "m.png")).ravel().tolist()) == {0, 255}
    assert float(again.float().mean()) == pytest.approx(float(mask.float().mean()), abs=0.03)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match="not a readable picture"):
        read_picture(tmp_path / "x.png")


def test_a_truncated_picture(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "x.png"
    )
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a readable picture"):
        read_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 64), (64, 64)), ((400, 100), (128, 32)), ((10, 1000), (8, 640))]
)
def test_fitted_size(size: tuple, expected: tuple) -> None:
    assert fitted_size(*size, side=64, multiple=8) == expected


def test_outline_is_the_inner_border() -> None:
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[1:6, 1:6] = True
    ring = mask.clone()
    ring[2:5, 2:5] = False
    assert torch.equal(outline(mask), ring)


def test_overlay_and_sheet_have_the_expected_size() -> None:
    picture, masks = torch.rand(3, 10, 12), torch.zeros(1, 10, 12, dtype=torch.bool)
    masks[0, 2:5, 2:5] = True
    drawn = overlay(picture, masks, scale=3)
    assert drawn.size == (36, 30)
    grid = sheet({"one": [drawn, drawn], "two": [drawn]}, ["a", "b"], side=50)
    assert grid.height == 22 + 2 * 54
    wide = sheet({"one\nlonger than that": [drawn, drawn]}, side=50)
    assert wide.width - grid.width == 7 * (len("longer than that") - len("two"))
