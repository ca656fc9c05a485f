"""True masks: they act on no run, but the IoU curves of a stored run belong to those that it saw."""

from collections.abc import Mapping, Sequence

from ..examples import Example, NamedMasks, stack_masks
from ..masks.measures import iou
from ..method.loop import by_name, mean_of
from ..method.state import Curves
from .digest import Digest

IOU, AREA = "iou/", "area/"


def truth_digest(examples: Sequence[Example]) -> str:
    """Return a hex digest of the examples' true masks, or "" if they have none."""
    truth = [dict(sorted(example.truth.items())) for example in examples]
    return Digest().add(truth).hexdigest() if any(truth) else ""


def without_iou(curves: Curves) -> Curves:
    """Return the curves that compare with nothing."""
    return {name: points for name, points in curves.items() if not name.startswith(IOU)}


def last_iou(
    curves: Curves, masks: Sequence[NamedMasks], examples: Sequence[Example]
) -> Mapping[str, tuple[tuple[int, float], ...]]:
    """Return IoU curves of one point each: that of a run's last masks.

    Args:
        curves: the run's curves; each point stands at the last step of the concept's area.
        masks: per picture, concept -> mask.
        examples: as many pictures with their true masks, which are resized to the masks.
    """
    rows = []
    for found, example in zip(masks, examples, strict=True):
        names = [name for name in found if name in example.truth]
        if names:
            size = (found[names[0]].shape[-2], found[names[0]].shape[-1])
            pair = stack_masks(found, names, size), stack_masks(example.truth, names, size)
            rows.append(by_name(names, iou(*pair)))
    return {
        IOU + name: ((curves[AREA + name][-1][0], value),)
        for name, value in mean_of(rows).items()
        if AREA + name in curves
    }
