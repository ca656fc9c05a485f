"""Backgrounds and surface patterns of the demo world, as arrays of tones."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from numpy.random import Generator

SIZE = 64
_FINE = 2 * SIZE
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 36, 40),
    "green": (30, 150, 52),
    "blue": (36, 70, 214),
    "yellow": (248, 214, 32),
    "purple": (136, 44, 166),
    "orange": (246, 130, 24),
    "white": (246, 246, 246),
    "black": (26, 26, 30),
}
NEW_COLOURS: dict[str, Colour] = {
    "pink": (248, 138, 186),
    "teal": (16, 158, 150),
    "brown": (112, 66, 30),
    "lime": (168, 226, 40),
    "gray": (128, 128, 132),
    "gold": (190, 150, 60),
}
_DARK_ON = ("yellow", "orange", "white", "pink", "lime", "gold")


def marking(colour: str) -> Colour:
    """Second colour of a pattern on an object of that colour: dark on light, light on dark."""
    ink = (52, 40, 36) if colour in _DARK_ON else (246, 244, 236)
    own = (COLOURS | NEW_COLOURS)[colour]
    red, green, blue = (round(0.75 * a + 0.25 * b) for a, b in zip(ink, own, strict=True))
    return red, green, blue


def _grid(size: int) -> tuple[Float[ndarray, "s s"], Float[ndarray, "s s"]]:
    """x and y of the points of a fine canvas, in pixels of the 64-pixel picture."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (SIZE / size)
    x, y = np.meshgrid(line, line)  # a list in NumPy 1
    return x, y


_X, _Y = _grid(_FINE)


def _shrink(tone: Float[ndarray, "fine fine"]) -> Float[ndarray, "64 64"]:
    return tone.reshape(SIZE, 2, SIZE, 2).mean(axis=(1, 3))


def _clouds(rng: Generator, cells: int) -> Float[ndarray, "64 64"]:
    """Smooth noise: bilinear enlargement of `cells` x `cells` random values, about in [-2, 2]."""
    values = rng.standard_normal((cells, cells)).astype(np.float32)
    at = np.linspace(0, cells - 1.001, SIZE, dtype=np.float32)
    low = at.astype(int)
    part = at - low
    weights = np.zeros((SIZE, cells), dtype=np.float32)
    weights[np.arange(SIZE), low] = 1 - part
    weights[np.arange(SIZE), low + 1] = part
    return weights @ values @ weights.T


def _grain(rng: Generator, amount: float) -> Float[ndarray, "64 64"]:
    return rng.standard_normal((SIZE, SIZE), dtype=np.float32) * amount


def _grass(rng: Generator) -> Float[ndarray, "64 64"]:
    blades = np.repeat(rng.standard_normal((10, 32), dtype=np.float32), 8, axis=0)
    shifts = rng.integers(0, 8, 32)
    rows = np.arange(SIZE)[:, None] + shifts[None]
    return 0.5 + 0.28 * np.repeat(blades[rows, np.arange(32)[None]], 2, axis=1)


def _sand(rng: Generator) -> Float[ndarray, "64 64"]:
    bend = 2.5 * np.sin(_X / rng.uniform(7, 10) + rng.uniform(0, 6.3))
    ripple = np.sin((_Y + bend) * (2 * np.pi / 9) + rng.uniform(0, 6.3))
    return 0.5 + 0.3 * _shrink(ripple) + _grain(rng, 0.16)


def _brick(rng: Generator) -> Float[ndarray, "64 64"]:
    y = _Y + rng.uniform(0, 9)
    row = (y // 9).astype(int)
    x = _X + rng.uniform(0, 18) + 9.0 * (row % 2)
    shade = rng.uniform(0.0, 0.3, (9, 6)).astype(np.float32)
    mortar = (y % 9 < 1.75) | (x % 18 < 1.75)
    return _shrink(np.where(mortar, 1.0, shade[row, (x // 18).astype(int)]))


def _sky(rng: Generator) -> Float[ndarray, "64 64"]:
    return np.clip(1.1 * _clouds(rng, 6) - 0.1, 0, 1)


def _snow(rng: Generator) -> Float[ndarray, "64 64"]:
    return np.clip(0.32 + 0.3 * _clouds(rng, 5), 0, 1) + _grain(rng, 0.06)


def _water(rng: Generator) -> Float[ndarray, "64 64"]:
    bend = 1.6 * np.sin(_X * (2 * np.pi / 21) + rng.uniform(0, 6.3))
    wave = np.sin((_Y + bend) * (2 * np.pi / 8) + rng.uniform(0, 6.3))
    return _shrink(np.clip(wave, 0, 1) ** 2) + 0.12 * _clouds(rng, 5)


def _wood(rng: Generator) -> Float[ndarray, "64 64"]:
    x = _X + rng.uniform(0, 16)
    plank = (x // 16).astype(int)
    shade = rng.uniform(0.3, 0.75, 6).astype(np.float32)
    bend = 1.2 * np.sin(_Y / 9 + 2.0 * plank)
    tone = shade[plank] + 0.16 * np.sin((x + bend) * (2 * np.pi / 5.3))
    return _shrink(np.where(x % 16 < 1.5, -0.25, tone))


def _stone(rng: Generator) -> Float[ndarray, "64 64"]:
    cell = np.stack(np.meshgrid(np.arange(-1, 6), np.arange(-1, 6)), -1).reshape(-1, 2)
    seeds = ((cell + rng.uniform(0.2, 0.8, cell.shape)) * 13).astype(np.float32)
    line = np.arange(SIZE, dtype=np.float32)
    far_x = (line[:, None] - seeds[None, :, 0]) ** 2
    far_y = (line[:, None] - seeds[None, :, 1]) ** 2
    far = far_y[:, None] + far_x[None]
    near = np.argmin(far, axis=-1)
    two = np.sqrt(np.partition(far, 1, axis=-1)[..., :2])
    shade = rng.uniform(0.45, 0.9, len(seeds)).astype(np.float32)[near]
    return shade * np.clip((two[..., 1] - two[..., 0]) / 2.2, 0.1, 1)


# Each background: colour at tone 0, colour at tone 1, the tones.
BACKGROUNDS: dict[str, tuple[Colour, Colour, Callable[[Generator], ndarray]]] = {
    "grass": ((72, 122, 48), (136, 182, 84), _grass),
    "sand": ((208, 180, 126), (236, 214, 166), _sand),
    "brick": ((146, 70, 52), (206, 190, 174), _brick),
    "sky": ((120, 178, 232), (244, 248, 252), _sky),
    "snow": ((248, 250, 254), (204, 216, 232), _snow),
    "water": ((24, 92, 124), (112, 184, 196), _water),
    "wood": ((98, 62, 36), (190, 138, 86), _wood),
    "stone": ((58, 60, 66), (168, 170, 174), _stone),
}


def background(name: str, rng: Generator) -> Float[ndarray, "64 64 3"]:
    """A background picture; values 0 to 255."""
    dark, light, tones = BACKGROUNDS[name]
    tone = np.clip(tones(rng), -0.3, 1.2)[..., None]
    shift = rng.uniform(-7, 7, 3)
    low, high = (np.asarray(colour, dtype=np.float32) + shift for colour in (dark, light))
    return np.clip(low + (high - low) * tone, 0, 255).astype(np.float32)


def _striped(u: ndarray, v: ndarray) -> ndarray:
    return (u % 10.0) < 4.4


def _dotted(u: ndarray, v: ndarray) -> ndarray:
    return ((u % 10.0) - 5.0) ** 2 + ((v % 10.0) - 5.0) ** 2 < 3.0**2


def _checked(u: ndarray, v: ndarray) -> ndarray:
    return ((u // 7.0) + (v // 7.0)) % 2 < 1


def _zigzag(u: ndarray, v: ndarray) -> ndarray:
    return ((u + 1.6 * np.abs((v % 10.0) - 5.0)) % 11.0) < 5.0


def _rings(u: ndarray, v: ndarray) -> ndarray:
    return (np.hypot(u, v) % 9.0) < 4.2


def _halves(u: ndarray, v: ndarray) -> ndarray:
    return u < 0


def _lattice(u: ndarray, v: ndarray) -> ndarray:
    return ((u % 10.0) < 3.2) | ((v % 10.0) < 3.2)


Pattern = Callable[[ndarray, ndarray], ndarray]
PATTERNS: dict[str, Pattern | None] = {
    "plain": None,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
}
NEW_PATTERNS: dict[str, Pattern | None] = {
    "zigzag": _zigzag,
    "rings": _rings,
    "halves": _halves,
    "lattice": _lattice,
}
_CENTRED = ("rings", "halves")


def pattern_mask(
    name: str,
    x: Float[ndarray, "h w"],
    y: Float[ndarray, "h w"],
    angle: float,
    phase: tuple[float, float],
) -> Bool[ndarray, "h w"] | None:
    """Where an object's surface has its second colour; None for a plain surface.

    `x` and `y` are pixels from the object's centre, `angle` is in radians, `phase` in pixels.
    """
    test = (PATTERNS | NEW_PATTERNS)[name]
    if test is None:
        return None
    shift = (0.0, 0.0) if name in _CENTRED else phase
    u = np.cos(angle) * x + np.sin(angle) * y + shift[0]
    v = np.cos(angle) * y - np.sin(angle) * x + shift[1]
    return test(u, v)


def to_uint8(picture: Float[ndarray, "h w 3"]) -> UInt8[ndarray, "h w 3"]:
    """Round a picture of values 0 to 255."""
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
