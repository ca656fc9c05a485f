"""How values are taken apart for a hash: containers, plain things, and objects with all that they hold."""

import types
from collections import deque
from collections.abc import Iterator, Set
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

Parts = list[Any]
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, type(Ellipsis), type(NotImplemented),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
BUILTIN = (
    types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, np.ufunc,
)  # fmt: skip
HEAP_TYPE, IMMUTABLE_TYPE = 1 << 9, 1 << 8  # flags of CPython's classes
# Built-in types whose content is read in full when a Python class derives from them.
KNOWN = (object, dict, list, tuple, set, frozenset, deque, str, int, float, complex, bytes, type,
         Enum, BaseException, Exception, PurePath, nn.Module)  # fmt: skip


class Unreadable(Exception):
    """A value acts on a run, but what it does cannot be read; the message names it."""


@runtime_checkable
class Reading(Protocol):
    """What taking a value apart asks of the hash that it is for: :class:`em_core.runs.digest.Digest`."""

    ignored: frozenset[str]

    def is_library(self, file: str) -> bool:
        """Return whether a file is of an installed library."""

    def sorted_parts(self, values: Set[Any]) -> Parts:
        """Return a digest of each value of a set, in an order that does not depend on the process."""


def name_of(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def array_parts(digest: Reading, value: Any) -> Parts:
    if value.dtype.hasobject:
        return [value.dtype.str, value.shape, value.reshape(-1).tolist()]
    return [value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()]


def mapping_parts(digest: Reading, value: Any) -> Parts:
    factory = getattr(value, "default_factory", None)
    return [factory, *(part for item in value.items() for part in item), *attributes(value)]


def sequence_parts(digest: Reading, value: Any) -> Parts:
    return [len(value), *value, *attributes(value)]


def set_parts(digest: Reading, value: Any) -> Parts:
    return [*digest.sorted_parts(value), *attributes(value)]


def base_value(value: Any) -> Any:
    """Return the str, int, ... that a value of a class derived from one is."""
    kinds: tuple[Any, ...] = (str, int, float, complex, bytes)
    return next(kind(value) for kind in kinds if isinstance(value, kind))


def attributes(value: Any) -> Parts:
    """Return the class of a value and all that its instance dict and slots hold, with the names.

    Raises:
        Unreadable: a class among its own is compiled code and holds what only that code can read.
    """
    kind = type(value)
    hidden = [cls for cls in kind.__mro__ if cls not in KNOWN and not is_written_in_python(cls)]
    found = dict(getattr(value, "__dict__", {}))
    for cls in kind.__mro__:
        for name, slot in vars(cls).items():
            if isinstance(slot, types.MemberDescriptorType) and not name.startswith("__"):
                found.setdefault(name, getattr(value, name, None))
    parts = [kind, *(part for name in sorted(found, key=str) for part in (name, found[name]))]
    return parts + (reduced(value) if hidden else [])


def is_written_in_python(cls: type) -> bool:
    """Return whether a class statement made a class, so that its dict and slots hold all it holds."""
    if not cls.__flags__ & HEAP_TYPE or cls.__flags__ & IMMUTABLE_TYPE:
        return False
    return any(
        "__dict__" in vars(c) or "__slots__" in vars(c) for c in cls.__mro__ if c not in KNOWN
    )


def reduced(value: Any) -> Parts:
    """Return what the `copy` module would rebuild a compiled value from.

    Raises:
        Unreadable: there is no such thing.
    """
    try:
        made = value.__reduce_ex__(2)
    except Exception as error:
        raise Unreadable(f"an object of the kind {name_of(type(value))}") from error
    if isinstance(made, str):
        return [made]
    return [list(part) if isinstance(part, Iterator) else part for part in made]


def object_parts(digest: Reading, value: Any) -> Parts:
    """Take an object of any class apart.

    Raises:
        Unreadable: it is of compiled code and cannot be copied, such as an open file or a thread.
    """
    return attributes(value)
