"""What happens in a run, in words."""

from collections.abc import Mapping


def say_missing(missing: Mapping[str, tuple[int, ...]], pictures: int) -> str:
    """A line on concepts that were not found; empty if all were.

    Args:
        missing: concept -> numbers, from 1, of the pictures in which it was not found.
        pictures: how many there are.
    """
    lines = []
    for name, numbers in missing.items():
        where = f" in picture {', '.join(map(str, numbers))}" if pictures > 1 else ""
        lines.append(f"{name}: nothing found{where}; name it by another word, or paint a mask")
    return ". ".join(lines)
