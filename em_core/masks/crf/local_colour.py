"""Local colour models: how much more likely a pixel's colour is under each label than around it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .filtering import LatticeFilter

FLOOR = 0.05  # share of a label that counts as nothing; bounds the evidence of a single colour


@dataclass(frozen=True)
class LocalColour:
    """Colour models of labels in a window around each pixel, by kernel density.

    GrabCut (Rother, Kolmogorov and Blake 2004) learns a colour model of each label from the present
    segmentation and segments again; Video SnapCut (Bai, Wang, Simons and Sapiro 2009) makes such models
    local. Here a model is the density of a label's colours under the CRF's own appearance kernel.

    Attributes:
        alike: filter over pixels near in place and colour.
        near: filter over pixels near in place.
    """

    alike: LatticeFilter
    near: LatticeFilter

    def evidence(self, Q: Float[Tensor, "labels n"]) -> Float[Tensor, "labels n"]:
        """log p(colour | label, place) - log p(colour | place), for labels with marginals Q.

        By Bayes' rule this is the log of a label's share among the pixels near in place and colour,
        less that of its share among the pixels near in place. A small label's share is small in both,
        so that it is not outvoted as it is in the Potts model's messages. `FLOOR` is added to both.
        """
        among_alike = label_shares(self.alike, Q)
        among_near = label_shares(self.near, Q)
        return torch.log((among_alike + FLOOR) / (among_near + FLOOR))


def label_shares(filter: LatticeFilter, Q: Float[Tensor, "labels n"]) -> Float[Tensor, "labels n"]:
    """Share of each label around each pixel, 0..1: means of Q weighted by the filter.

    The last label's share is what the others leave, which spares filtering it.
    """
    channels = torch.cat([torch.ones_like(Q[:1]), Q[:-1]]).t().contiguous()
    total, *parts = filter(channels).t().unbind(0)
    shares = torch.stack([part / total for part in parts])
    return torch.cat([shares, 1 - shares.sum(dim=0, keepdim=True)]).clamp_(min=0, max=1)
