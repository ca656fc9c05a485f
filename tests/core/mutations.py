"""Safetensors files with something wrong in them: flipped bits, cuts, and headers that lie."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

HUGE = (0, 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63, 2**64 - 1)
DTYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "X99",
    "",
)
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 1e999, float("nan"), 10**400, "", "x", "\0", "\udcff", "../x", [], {}, [[]],
    [None], {"a": {}}, "9" * 5000, "[" * 20000,
)  # fmt: skip


def flipped(data: bytes, g: random.Random) -> bytes:
    """1 to 8 bits flipped, half the time in the header."""
    out, header = bytearray(data), 8 + struct.unpack("<Q", data[:8])[0]
    end = header if g.random() < 0.5 else len(data)
    for _ in range(g.choice((1, 1, 1, 2, 8))):
        out[g.randrange(end)] ^= 1 << g.randrange(8)
    return bytes(out)


def cut(data: bytes, g: random.Random) -> bytes:
    """Something removed, inserted, doubled, zeroed or appended."""
    a, b = sorted(g.randrange(len(data) + 1) for _ in range(2))
    filler = g.randbytes(g.choice((1, 8, 4096)))
    return g.choice((
        data[:a], data[a:], data[:a] + data[b:], data[:a] + filler + data[a:], data + filler,
        data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:], b"",
    ))  # fmt: skip


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys or indices."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def spoil(value: Any, g: random.Random) -> None:
    """Change, remove, swap or rename one thing in a JSON value."""
    holder, key = g.choice(places(value, []))
    old, way = holder[key], g.randrange(5)
    if way == 0:
        holder[key] = g.choice(ODD)
    elif way == 1:
        del holder[key]
    elif way == 2 and isinstance(holder, dict):
        holder[g.choice((str(key) + "x", str(key)[:-1], "__metadata__", "$tensor"))] = holder.pop(
            key
        )
    elif isinstance(old, bool) or not isinstance(old, (int, float, str)):
        holder[key] = g.choice((*HUGE, *DTYPES))
    elif isinstance(old, str):
        holder[key] = g.choice((old.upper() + "1", old[::-1], g.choice(DTYPES), old + old))
    else:
        holder[key] = g.choice((old + 1, old * 2, -old, *HUGE))


def lying(data: bytes, g: random.Random) -> bytes:
    """Another header before the same tensors: of its own JSON, or of the description inside it."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(g.choice((1, 1, 2, 3))):
        texts = header.get("__metadata__")
        if g.random() < 0.5 and isinstance(texts, dict) and "visual_concepts" in texts:
            try:
                inner = json.loads(texts["visual_concepts"])
                spoil(inner, g)
                texts["visual_concepts"] = json.dumps(inner)
            except (ValueError, TypeError, RecursionError, IndexError):
                texts["visual_concepts"] = "{"
        elif header:
            spoil(header, g)
    text = json.dumps(header).encode()
    size = len(text) if g.random() < 0.9 else g.choice((*HUGE, len(text) + 1, len(text) - 1))
    return struct.pack("<Q", size) + text + rest


WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": flipped,
    "cuts": cut,
    "headers": lying,
}
