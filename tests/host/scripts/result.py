"""What two runs are compared by."""

from typing import Any

import torch
from torch import Tensor


def result(state: Any) -> dict[str, Tensor]:
    """Losses per step, maps, masks and vectors of a run's state."""
    (picture,) = state.pictures
    found = {"maps": picture.maps, "masks": picture.masks, "labels": picture.labels}
    for name, points in state.curves.items():
        if "loss/" in name:
            found[name] = torch.tensor([value for _, value in points])
    for name, of in state.vectors.items():
        found |= {f"vectors/{name}": v.detach() for v in of.values()}
    return {name: x.detach().clone().contiguous() for name, x in found.items()}
