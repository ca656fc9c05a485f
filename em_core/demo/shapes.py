"""Outlines of the demo world's shapes: polygons in the square [-1, 1]^2, y pointing down."""

from collections.abc import Sequence
from math import cos, pi, sin

Point = tuple[float, float]
Polygon = tuple[Point, ...]


def _arc(centre: Point, radius: float, start: float, end: float, steps: int = 32) -> Polygon:
    """Points on a circle from angle `start` to `end`, in turns, 0 pointing right."""
    angles = [2 * pi * (start + (end - start) * step / steps) for step in range(steps + 1)]
    return tuple((centre[0] + radius * cos(a), centre[1] + radius * sin(a)) for a in angles)


def _star(points: int = 5, inner: float = 0.45) -> Polygon:
    radii = [1.08 if index % 2 == 0 else inner * 1.08 for index in range(2 * points)]
    angles = [pi * index / points - pi / 2 for index in range(2 * points)]
    return tuple((r * cos(a), r * sin(a) + 0.06) for r, a in zip(radii, angles, strict=True))


def _heart() -> Polygon:
    angles = [2 * pi * step / 48 for step in range(48)]
    curve = [
        (16 * sin(a) ** 3, 13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a))
        for a in angles
    ]
    return tuple((x / 16.5, -(y + 2.5) / 15.0) for x, y in curve)


def _cross(arm: float = 0.34) -> Polygon:
    corner = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    quarters: list[Point] = []
    for _ in range(4):
        quarters += corner
        corner = [(-y, x) for x, y in corner]
    return tuple(quarters)


def _crescent() -> Polygon:
    outer = _arc((0.1, 0.0), 1.0, 0.13, 0.87, 40)
    inner = _arc((0.55, 0.0), 0.75, 0.77, 0.23, 32)
    return outer + inner


def _fish() -> Polygon:
    body = tuple((x * 0.72 - 0.26, y * 0.55) for x, y in _arc((0.0, 0.0), 1.0, 0.06, 0.94, 32))
    return (*body, (1.0, -0.62), (0.82, 0.0), (1.0, 0.62))


def _bell() -> Polygon:
    dome = _arc((0.0, -0.25), 0.55, 0.5, 1.0, 20)
    right = ((0.62, 0.3), (0.95, 0.6), (0.28, 0.62))
    clapper = _arc((0.0, 0.66), 0.28, 0.0, 0.5, 12)
    return (*dome, *right, *clapper, (-0.95, 0.6), (-0.62, 0.3))


def _drop() -> Polygon:
    return ((0.0, -1.1), *_arc((0.0, 0.35), 0.7, -0.09, 0.59, 32))


def _square_polygon(half: float) -> Polygon:
    return ((-half, -half), (half, -half), (half, half), (-half, half))


_CIRCLE = _arc((0.0, 0.0), 0.96, 0.0, 1.0, 48)
_ARROW = ((-1.0, -0.3), (0.1, -0.3), (0.1, -0.8), (1.0, 0.0), (0.1, 0.8), (0.1, 0.3), (-1.0, 0.3))
_HOUSE = (
    (0.0, -1.05),
    (0.98, -0.1),
    (0.72, -0.1),
    (0.72, 0.9),
    (-0.72, 0.9),
    (-0.72, -0.1),
    (-0.98, -0.1),
)
_KEY_SHAFT = (
    (-0.25, -0.16),
    (1.0, -0.16),
    (1.0, 0.52),
    (0.76, 0.52),
    (0.76, 0.18),
    (0.52, 0.18),
    (0.52, 0.46),
    (0.28, 0.46),
    (0.28, 0.18),
    (-0.25, 0.18),
)
_MUG = ((-0.9, -0.85), (0.45, -0.85), (0.45, 0.85), (-0.9, 0.85))
_CROWN = (
    (-0.95, 0.8),
    (-0.98, -0.7),
    (-0.45, 0.0),
    (0.0, -0.95),
    (0.45, 0.0),
    (0.98, -0.7),
    (0.95, 0.8),
)
_TRIANGLE = ((0.0, -0.98), (1.05, 0.84), (-1.05, 0.84))
_DIAMOND = ((0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0))
_HANDLE = _arc((0.45, 0.0), 0.55, 0.0, 1.0)
_KEY_BOW = _arc((-0.5, 0.0), 0.5, 0.0, 1.0)

# Each shape: polygons to fill, then polygons to cut out again.
Outline = tuple[Sequence[Polygon], Sequence[Polygon]]
KNOWN: dict[str, Outline] = {
    "star": ((_star(),), ()),
    "circle": ((_CIRCLE,), ()),
    "square": ((_square_polygon(0.86),), ()),
    "triangle": ((_TRIANGLE,), ()),
    "heart": ((_heart(),), ()),
    "ring": ((_CIRCLE,), (_arc((0.0, 0.0), 0.46, 0.0, 1.0),)),
    "cross": ((_cross(),), ()),
    "diamond": ((_DIAMOND,), ()),
}
NEW: dict[str, Outline] = {
    "crescent": ((_crescent(),), ()),
    "arrow": ((_ARROW,), ()),
    "house": ((_HOUSE,), ()),
    "fish": ((_fish(),), ()),
    "key": ((_KEY_SHAFT, _KEY_BOW), (_arc((-0.5, 0.0), 0.2, 0.0, 1.0),)),
    "mug": ((_HANDLE, _MUG), (_arc((0.62, 0.0), 0.2, 0.0, 1.0),)),
    "bell": ((_bell(),), ()),
    "drop": ((_drop(),), ()),
    "crown": ((_CROWN,), ()),
}
OUTLINES: dict[str, Outline] = {**KNOWN, **NEW}


def placed(polygon: Polygon, scale: float, angle: float, centre: Point) -> list[Point]:
    """Polygon scaled, turned by `angle` radians and moved to `centre`."""
    c, s = cos(angle) * scale, sin(angle) * scale
    return [(c * x - s * y + centre[0], s * x + c * y + centre[1]) for x, y in polygon]
