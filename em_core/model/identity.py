"""What a concept file remembers of the model that its concepts were learned on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelIdentity:
    """What a concept file remembers of its base model.

    Attributes:
        family: readable name of the architecture, such as "sd1" or "sdxl".
        architecture: hash of the names and shapes of all weights.
        encoders: text encoder name -> width of its token vectors.
        sample: [s] values read at fixed places of the weights; tells fine-tunes apart.
    """

    family: str
    architecture: str
    encoders: Mapping[str, int]
    sample: Float[Tensor, " s"]

    @classmethod
    def of_weights(
        cls, family: str, encoders: Mapping[str, int], weights: Mapping[str, nn.Parameter]
    ) -> "ModelIdentity":
        """Identity of the weights as they are now; the middle value of each is sampled."""
        names = sorted(weights)
        shapes = "\n".join(f"{name} {tuple(weights[name].shape)}" for name in names)
        flat = [weights[name].detach().reshape(-1) for name in names]
        sample = torch.stack([x[len(x) // 2].float().cpu() for x in flat]).clone()
        return cls(family, hashlib.sha256(shapes.encode()).hexdigest(), encoders, sample)
