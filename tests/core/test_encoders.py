"""CLIP, DINO and LPIPS against torchmetrics, and against the models called by hand."""

import builtins
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import (
    MISSING,
    SIDE,
    InTensors,
    bytes_of,
    save_backbone,
    save_clip,
    save_dino,
    without_downloads,
)
from torch import Tensor
from transformers import AutoModel

from em_core.demo.scenes import concept_scene
from em_core.errors import UserError
from em_core.evaluate.perceptual import Lpips
from em_core.evaluate.pretrained import Clip, Dino
from em_core.pictures import from_image, to_image

TEXTS = ["a photo of a red star on grass", "a blue circle", "snow"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def torchmetrics() -> Any:
    return pytest.importorskip("torchmetrics", reason=MISSING)


def scenes(count: int = 3) -> list[Tensor]:
    """Pictures of different sizes, the second not square."""
    from PIL import Image

    images = [Image.fromarray(concept_scene(160 + i, "A").image) for i in range(count)]
    return [from_image(image.resize((64 + 9 * i, 64))) for i, image in enumerate(images)]


def test_clip_is_torchmetrics_clip_score(torchmetrics: Any, clip: Path) -> None:
    """100 times the cosine, of pictures with texts and with each other."""
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    ours, pictures = Clip.load(clip), scenes()
    model = InTensors(ours)
    seen, read = ours.images(pictures), ours.texts(TEXTS)
    raw = [bytes_of(picture) for picture in pictures]
    for i, text in enumerate(TEXTS):
        theirs = _clip_score_update(raw, [text] * 3, model, ours.processor)[0]
        torch.testing.assert_close(100 * seen @ read[i], theirs.float(), atol=1e-3, rtol=1e-4)
    for i in range(3):
        theirs = _clip_score_update(raw, [raw[i]] * 3, model, ours.processor)[0]
        torch.testing.assert_close(100 * seen @ seen[i], theirs.float(), atol=1e-3, rtol=1e-4)
    assert len({round(float(x), 2) for x in (seen @ read.T).flatten()}) > 4  # it tells them apart


def test_clip_score_as_a_metric(torchmetrics: Any, clip: Path) -> None:
    from torchmetrics.multimodal import CLIPScore

    ours, pictures = Clip.load(clip), scenes()
    model = InTensors(ours)
    metric = CLIPScore(model_name_or_path=lambda: (model, ours.processor))
    metric.update([bytes_of(picture) for picture in pictures], TEXTS)
    cosines = (ours.images(pictures) * ours.texts(TEXTS)).sum(dim=1)
    expected = (100 * cosines).mean().clamp(min=0)
    torch.testing.assert_close(metric.compute().float(), expected, atol=1e-3, rtol=1e-4)


def test_a_long_prompt_is_cut(clip: Path) -> None:
    ours = Clip.load(clip)
    long = " and ".join(["a red star"] * 60)
    found = ours.texts([long, long + " on snow"])
    assert torch.equal(found[0], found[1])


def test_dino_is_the_class_token(dino: Path) -> None:
    """Preprocessed by hand: bilinear to 32x32, to -1..1."""
    from PIL import Image

    pictures = scenes()
    model = AutoModel.from_pretrained(dino).eval()
    small = [
        to_image(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures
    ]
    x = torch.stack([from_image(image) for image in small]) * 2 - 1
    with torch.no_grad():
        tokens = model(pixel_values=x).last_hidden_state[:, 0]
    expected = tokens / tokens.norm(dim=1, keepdim=True)
    found = Dino.load(dino).images(pictures)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((found @ found.T).min()) < 0.99


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_torchmetrics_lpips(
    torchmetrics: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_downloads(monkeypatch)
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    theirs = LearnedPerceptualImagePatchSimilarity(net_type=kind, normalize=True)
    torch.manual_seed(9)  # the backbone that ours starts from is another one
    ours = Lpips.load(save_backbone(tmp_path, kind))
    stack = torch.stack([from_image(to_image(p).resize((64, 64))) for p in scenes()])
    for i, j in combinations(range(3), 2):
        theirs.reset()
        theirs.update(stack[[i]], stack[[j]])
        torch.testing.assert_close(
            ours(stack[[i]], stack[[j]])[0], theirs.compute(), atol=1e-6, rtol=1e-5
        )
    assert float(ours(stack[[0]], stack[[1]])) > 1e-4
    assert float(ours(stack[[0]], stack[[0]])) == 0


@pytest.fixture
def backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    pytest.importorskip("torchmetrics", reason=MISSING)
    without_downloads(monkeypatch)
    yield save_backbone(tmp_path / "alex", "alex")


def test_backbones_that_are_none(backbone: Path, tmp_path: Path) -> None:
    file = backbone / "model.safetensors"
    weights = load_file(file)
    with pytest.raises(UserError, match=r"one \.safetensors file of VGG16"):
        Lpips.load(tmp_path / "nowhere")
    torch.save(weights, backbone / "alexnet.pth")
    assert Lpips.load(backbone)  # the pickled file beside it is not looked at
    file.unlink()
    with pytest.raises(UserError, match="never opened"):
        Lpips.load(backbone)
    with pytest.raises(UserError, match="never opened"):
        Lpips.load(backbone / "alexnet.pth")
    file.write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="cannot be read"):
        Lpips.load(backbone)
    save_file({"conv.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(UserError, match="holds another network"):
        Lpips.load(backbone)
    save_file({n: w for n, w in weights.items() if n != "features.6.bias"}, file)
    with pytest.raises(UserError, match=r"no whole AlexNet.*features\.6\.bias of shape.*got none"):
        Lpips.load(backbone)
    save_file(weights | {"features.3.weight": torch.zeros(192, 64, 3, 3)}, file)
    with pytest.raises(
        UserError, match=r"features\.3\.weight of shape.*got one of \(192, 64, 3, 3\)"
    ):
        Lpips.load(backbone)


@pytest.mark.parametrize("kind", [Clip, Dino])
def test_encoders_that_are_none(kind: Any, clip: Path, dino: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Could not load a \w+ model from"):
        kind.load(tmp_path)
    with pytest.raises(UserError, match="Could not load a"):
        kind.load("owner/not-on-this-machine")
    folder = tmp_path / "copy"
    shutil.copytree(clip if kind is Clip else dino, folder)
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "encoder" in name)
    kept = {name: weight for name, weight in weights.items() if name != gone}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are missing"):
        kind.load(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="Could not load a"):
        kind.load(folder)  # what is pickled is not opened


@pytest.mark.parametrize(
    ("module", "load", "said"),
    [
        ("transformers", Clip.load, r"needs transformers .*'evaluate'.*pip install transformers"),
        (
            "torchmetrics",
            Lpips.load,
            r"LPIPS needs torchmetrics .*'evaluate'.*pip install torchmetrics",
        ),
    ],
)
def test_what_is_not_installed_is_named(
    module: str, load: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    folder = save_backbone(tmp_path, "alex")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=said):
        load(folder)
