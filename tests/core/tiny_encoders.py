"""CLIP, DINO and LPIPS backbones with random weights, saved as users have theirs."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.utils import logging

from em_core.demo import model_path
from em_core.evaluate.pretrained import Clip
from em_core.pictures import to_image

MISSING = "torchmetrics is missing: pip install torchmetrics"
SIDE = 32
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SEEN = {"image_size": SIDE, "patch_size": 8}


def save_clip(folder: Path) -> Path:
    """A CLIP that sees 32x32 pixels and reads the demo model's pieces."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1)
    text = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(text_config=SMALL | text, vision_config=SMALL | SEEN, projection_dim=12)
    model = CLIPModel(config)
    for part in model.modules():  # larger than usual, or all pictures would look alike
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.4)
    model.save_pretrained(folder)
    shown = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer")
    CLIPProcessor(image_processor=shown, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A vision transformer that sees 32x32 pixels."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(2)
    model = ViTModel(ViTConfig(**SMALL, **SEEN), add_pooling_layer=False)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.4)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def alexnet_features() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
    )  # fmt: skip


def vgg16_features() -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        else:
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


FEATURES = {"alex": alexnet_features, "vgg": vgg16_features}
NAMES = {"alex": "alexnet", "vgg": "vgg16"}


def random_features(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    return FEATURES[kind]()


def save_backbone(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"features.{n}": w.detach() for n, w in random_features(kind).state_dict().items()}
    classifier = {"classifier.0.weight": torch.zeros(2, 2)}  # as in whole networks
    save_file(weights | classifier, folder / "model.safetensors")
    return folder


def without_downloads(patch: pytest.MonkeyPatch) -> None:
    """Let torchvision give its networks with our random weights, whatever weights are asked for.

    Where there is no torchvision that works, a stand-in has the two networks' layers.
    """
    try:
        from torchvision import models
    except (ImportError, RuntimeError):
        models = stand_in(patch)
    for kind, name in NAMES.items():

        def build(kind: str = kind, weights: Any = None) -> nn.Module:
            network = nn.Module()
            network.features = random_features(kind)
            return network

        patch.setattr(models, name, build)


def stand_in(patch: pytest.MonkeyPatch) -> Any:
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    for name in NAMES.values():
        setattr(models, name, None)
    for name in ("AlexNet_Weights", "VGG16_Weights"):
        setattr(models, name, type(name, (), {"DEFAULT": None}))
    torchvision.models = models  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "torchvision", torchvision)
    patch.setitem(sys.modules, "torchvision.models", models)
    for module in ("torchmetrics.functional.image.lpips", "torchmetrics.image.lpip"):
        patch.setattr(f"{module}._TORCHVISION_AVAILABLE", True)
    return models


class InTensors:
    """A CLIP as torchmetrics expects it, whose features are tensors in every version of transformers."""

    def __init__(self, clip: Clip) -> None:
        self.model, self.config = clip.model, clip.model.config

    def to(self, device: Any) -> "InTensors":
        return self

    def eval(self) -> "InTensors":
        return self

    def get_image_features(self, *given: Tensor) -> Tensor:
        found = self.model.get_image_features(*given)
        return found if isinstance(found, Tensor) else found.pooler_output

    def get_text_features(self, *given: Tensor) -> Tensor:
        found = self.model.get_text_features(*given)
        return found if isinstance(found, Tensor) else found.pooler_output


def bytes_of(picture: Tensor) -> Tensor:
    return torch.from_numpy(np.array(to_image(picture))).permute(2, 0, 1)
