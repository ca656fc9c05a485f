"""LPIPS through torchmetrics, on a backbone that the user gives."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from .pretrained import EXTRA

BACKBONES = {"alex": "AlexNet", "vgg": "VGG16"}
FIRST = {11: "alex", 3: "vgg"}  # side of the first convolution's kernel
EXPECTED = (
    "Expected a folder with one .safetensors file of VGG16's or AlexNet's weights, named as in torchvision "
    "(features.0.weight, ...)"
)


class Lpips:
    """The learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924).

    The backbone's weights are the user's; the weights of the five layers' channels come with torchmetrics.
    """

    def __init__(self, network: Any, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network.to(device).eval(), torch.device(device)

    @classmethod
    def load(cls, source: Path | str, device: torch.device | str = "cpu") -> "Lpips":
        """Load the backbone from a folder, or from the file itself.

        Raises:
            UserError: torchmetrics or torchvision is not installed, or there is no such backbone.
        """
        weights = read_backbone(Path(source))
        first = next((w for name, w in weights.items() if name == "0.weight"), None)
        kind = FIRST.get(first.shape[-1]) if first is not None and first.ndim == 4 else None
        if kind is None:
            raise UserError(f"{source} holds another network. {EXPECTED}.")
        return cls(with_backbone(kind, weights, source), device)

    @torch.no_grad()
    def __call__(
        self, first: Float[Tensor, "n 3 H W"], second: Float[Tensor, "n 3 H W"]
    ) -> Float[Tensor, " n"]:
        """The distance of each pair of pictures in 0..1."""
        pair = (x.to(self.device, torch.float32) for x in (first, second))
        return self.network(*pair, normalize=True).reshape(-1).cpu()


def read_backbone(source: Path) -> dict[str, Tensor]:
    """Return a backbone's weights as `<layer>.weight` and `<layer>.bias`.

    Raises:
        UserError: there is not one safetensors file that can be read.
    """
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if len(files) != 1 or files[0].suffix != ".safetensors" or not files[0].is_file():
        raise UserError(
            f"No backbone for LPIPS in {source}. {EXPECTED}; pickled .pth files are never opened."
        )
    try:
        weights = load_file(files[0])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{files[0]} cannot be read ({error}). {EXPECTED}.") from error
    return {name.removeprefix("features."): weight for name, weight in weights.items()}


def with_backbone(kind: str, weights: dict[str, Tensor], source: Path | str) -> Any:
    """Return torchmetrics' network with these weights in its backbone.

    Raises:
        UserError: torchmetrics or torchvision is not installed, or a layer's weights are missing.
    """
    network = new_network(kind)
    slots = dict(network.net.named_parameters())  # slice<i>.<layer>.<weight or bias>
    for name, slot in slots.items():
        layer = name.partition(".")[2]
        found = weights.get(layer)
        if found is None or found.shape != slot.shape:
            got = "none" if found is None else f"one of {tuple(found.shape)}"
            raise UserError(
                f"{source} is no whole {BACKBONES[kind]}: expected features.{layer} of shape "
                f"{tuple(slot.shape)}, got {got}. {EXPECTED}."
            )
        slot.data.copy_(found)
    return network


def new_network(kind: Any) -> Any:
    """Return torchmetrics' LPIPS with random weights in its backbone; nothing is downloaded.

    Raises:
        UserError: torchmetrics or torchvision is not installed, or does not work with this PyTorch.
    """
    try:
        # The public class takes no backbone but the one it downloads.
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        return _NoTrainLpips(net=kind, pnet_rand=True)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"LPIPS needs torchmetrics {EXTRA} and a torchvision that fits the installed PyTorch: {error}. "
            "Install them: pip install torchmetrics torchvision. Or leave LPIPS out: with DINO, diversity is "
            "measured as 1 minus its cosine."
        ) from error
