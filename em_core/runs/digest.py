"""A hash of Python values by their content: the same in every process, or a word on why there is none.

It reads whatever patches on a model consist of: tensors and arrays, containers, functions with their
code, constants, closures and the helpers they call, and objects with all that they hold. What it
cannot read raises, because two such values must not be taken for the same.
"""

import functools
import hashlib
import logging
import re
import sysconfig
import threading
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import raw_bytes
from .digest_code import (
    builtin_parts,
    cell_parts,
    class_parts,
    code_parts,
    function_parts,
    module_parts,
    network_parts,
)
from .digest_values import (
    BUILTIN,
    PLAIN,
    Parts,
    Reading,
    Unreadable,
    array_parts,
    attributes,
    base_value,
    mapping_parts,
    name_of,
    object_parts,
    sequence_parts,
    set_parts,
)

__all__ = ["INSTALLED", "Digest", "Parts", "Reader", "Unreadable"]
Reader = tuple[type | tuple[type, ...], Callable[[Reading, Any], Parts]]
WHOLE, BLOCK = 2**22, 2**20  # bytes
MOST = 2_000_000  # values; a patch that holds more of them holds a whole program
VALUES = (tuple, frozenset, Enum, np.generic)  # whether two are one object says nothing
LOCKS = (type(threading.Lock()), type(threading.RLock()))
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


class Digest:
    """A SHA-256 over values.

    Attributes:
        readers: how values of some types are taken apart, before this module's own ways.
        libraries: folders of code that is installed rather than written for a patch: its classes and
            modules count by their names, and its functions by their own code, not by what they call.
        ignored: attributes of modules that say nothing of what they do.
    """

    def __init__(
        self,
        readers: tuple[Reader, ...] = (),
        libraries: frozenset[str] = frozenset(INSTALLED),
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        self.readers, self.libraries, self.ignored = readers, libraries, ignored
        self.hash = hashlib.sha256()
        self.visited = 0
        self.seen: dict[
            int, tuple[int, Any]
        ] = {}  # keeps values alive, so that no id is used twice

    def text(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.hash.update(b"%d " % len(data) + data)

    def hexdigest(self) -> str:
        return self.hash.hexdigest()

    def add(self, value: Any) -> "Digest":
        """Add a value and all that it holds.

        Raises:
            Unreadable: it holds something whose content cannot be read.
        """
        left = [value]
        while left:
            left += reversed(self.visit(left.pop()))
        return self

    def visit(self, value: Any) -> Parts:
        """Add the value itself, and return what it holds."""
        if type(value) in PLAIN:
            self.text(f"{type(value).__name__} {value!r}")
            return []
        if not isinstance(value, VALUES):
            if id(value) in self.seen:
                self.text(f"again {self.seen[id(value)][0]}")
                return []
            self.seen[id(value)] = len(self.seen), value
        self.visited += 1
        if self.visited > MOST:
            raise Unreadable(f"something that holds over {MOST:,} values")
        if isinstance(value, Tensor):
            self.tensor(value)
            return []
        parts = self.parts(value)
        self.text(f"{type(value).__module__} {type(value).__qualname__} {len(parts)}")
        return parts

    def tensor(self, tensor: Tensor) -> None:
        """Add a tensor's type, shape and every one of its bytes.

        Up to 4 MiB, such as a mask of 1024 x 1024 pixels, the bytes themselves are hashed; of more, the
        CRC-32 of each MiB, which is several times as fast.

        Raises:
            Unreadable: the tensor is of another pack's own class, or has no values of its own.
        """
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type == "meta":
            raise Unreadable(f"a tensor of the kind {name_of(type(tensor))}")
        self.text(f"tensor {tensor.dtype} {tuple(tensor.shape)}")
        data = raw_bytes(tensor.detach().resolve_conj().resolve_neg())
        if len(data) <= WHOLE:
            self.hash.update(data)
            return
        for start in range(0, len(data), BLOCK):
            self.hash.update(zlib.crc32(data[start : start + BLOCK]).to_bytes(4, "little"))

    def parts(self, value: Any) -> Parts:
        """Take a value apart."""
        for kinds, read in (*self.readers, *READERS):
            if isinstance(value, kinds):
                return read(self, value)
        return object_parts(self, value)

    def is_library(self, file: str) -> bool:
        """Return whether a file is of an installed library."""
        return any(Path(file).is_relative_to(folder) for folder in self.libraries)

    def sorted_parts(self, values: Set[Any]) -> Parts:
        """Return a digest of each value of a set, in an order that does not depend on the process."""
        return sorted(
            type(self)(self.readers, self.libraries, self.ignored).add(value).hexdigest()
            for value in values
        )


READERS: tuple[Reader, ...] = (
    (Enum, lambda digest, value: [type(value), value.name]),
    ((np.ndarray, np.generic), array_parts),
    (dict, mapping_parts),
    ((list, tuple, deque), sequence_parts),
    ((set, frozenset), set_parts),
    ((functools.partial, functools.partialmethod),
     lambda digest, value: [value.func, value.args, value.keywords, vars(value)]),
    (types.MethodType, lambda digest, value: [value.__func__, value.__self__]),
    (types.FunctionType, function_parts),
    (types.CodeType, code_parts),
    (types.CellType, cell_parts),
    (types.ModuleType, module_parts),
    (type, class_parts),
    (BUILTIN, builtin_parts),
    ((staticmethod, classmethod), lambda digest, value: [value.__func__]),
    (property, lambda digest, value: [value.fget, value.fset, value.fdel]),
    (slice, lambda digest, value: [value.start, value.stop, value.step]),
    (types.MappingProxyType, lambda digest, value: [dict(value)]),
    (re.Pattern, lambda digest, value: [value.pattern, value.flags]),
    (PurePath, lambda digest, value: [str(value)]),
    (weakref.ref, lambda digest, value: [value()]),
    (logging.Logger, lambda digest, value: [value.name]),
    (LOCKS, lambda digest, value: []),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket), lambda digest, value: [str(value)]),
    (torch.Generator, lambda digest, value: [value.get_state()]),
    (nn.Module, network_parts),
    ((str, int, float, complex, bytes),
     lambda digest, value: [base_value(value), *attributes(value)]),
)  # fmt: skip
