"""What happens in a run, and what came of it, in words."""

from collections.abc import Mapping, Sequence

from ..examples import NamedMasks
from ..masks.guards import Guards
from ..masks.measures import areas
from ..method.state import Curves
from ..runs.finding import FoundMasks
from .metrics import curves_of
from .trend import still_falls

DOUBT = (
    "what was found{} may be something else; look at its mask, and if that is wrong, name it by another "
    "word, or paint a mask"
)


def say_missing(
    missing: Mapping[str, Sequence[int]],
    pictures: int,
    doubtful: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """A line on concepts that were not found, or may not be what was found; empty if all is well.

    Args:
        missing: concept -> numbers, from 1, of the pictures in which it was not found.
        pictures: how many there are.
        doubtful: the same for those whose mask may show something else.
    """
    lines = []
    for concepts, what in (
        (missing, "nothing found{}; name it by another word, or paint a mask"),
        (doubtful or {}, DOUBT),
    ):
        for name, numbers in concepts.items():
            where = f" in picture {', '.join(map(str, numbers))}" if pictures > 1 else ""
            lines.append(f"{name}: {what.format(where)}")
    return ". ".join(lines)


def say_found(found: FoundMasks, number: int = 1, pictures: int = 1) -> str:
    """The same line on what was found without learning in picture `number`, from 1, of several."""
    missing, doubtful = (
        dict.fromkeys(names, (number,)) for names in (found.missing, found.doubtful)
    )
    return say_missing(missing, pictures, doubtful)


def say_masks(pictures: Sequence[NamedMasks]) -> str:
    """A line with the share of the picture that each concept covers, such as "rex 12%, doll nothing found".

    Args:
        pictures: each picture's masks by concept; where there are several, so are the shares.
    """
    shares: dict[str, list[str]] = {}
    for masks in pictures:
        for name, mask in masks.items():
            area = float(areas(mask))
            found = area >= Guards().min_area
            shares.setdefault(name, []).append(f"{area:.0%}" if found else "nothing found")
    return ", ".join(f"{name} {' and '.join(each)}" for name, each in shares.items())


def say_losses(curves: Curves) -> str:
    """Whether more steps may help, from the total loss of the run's last phase; "" where there are too few
    steps to tell."""
    curve = curves.get("joint_loss/total") or curves.get("loss/total") or ()
    falls = still_falls([value for _, value in curve])
    if falls is None:
        return ""
    return (
        "The loss is still falling: more steps may help."
        if falls
        else "The loss no longer falls measurably."
    )


def say_iou(curves: Curves) -> str:
    """A line with each concept's last IoU with its true mask; "" if no true mask is known."""
    last = {name: points[-1][1] for name, points in curves_of(curves, "iou").items()}
    each = ", ".join(f"{name} {value:.2f}" for name, value in last.items())
    return f"IoU with the true masks: {each}." if each else ""


def say_time(seconds: float) -> str:
    """A span of time in a few words, such as "40 s", "3 min" or "1 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
