"""A hash of Python values by their content: the same in every process, or a word on why there is none.

It reads whatever patches on a model consist of: tensors and arrays, containers, functions with their
code, constants, closures and the helpers they call, and objects with all that they hold. What it
cannot read raises, because two such values must not be taken for the same.
"""

import functools
import hashlib
import logging
import re
import sys
import sysconfig
import threading
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import raw_bytes

Parts = list[Any]
Reader = tuple[type | tuple[type, ...], Callable[["Digest", Any], Parts]]
WHOLE, BLOCK = 2**22, 2**20  # bytes
MOST = 2_000_000  # values; a patch that holds more of them holds a whole program
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, type(Ellipsis), type(NotImplemented),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
BUILTIN = (
    types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, np.ufunc,
)  # fmt: skip
HEAP_TYPE, IMMUTABLE_TYPE = 1 << 9, 1 << 8  # flags of CPython's classes
VALUES = (tuple, frozenset, Enum, np.generic)  # whether two are one object says nothing
DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
WRAPPED = (staticmethod, classmethod, property, functools.cached_property)
LOCKS = (type(threading.Lock()), type(threading.RLock()))
# Built-in types whose content is read in full when a Python class derives from them.
KNOWN = (object, dict, list, tuple, set, frozenset, deque, str, int, float, complex, bytes, type,
         Enum, BaseException, Exception, PurePath, nn.Module)  # fmt: skip
NOT_READ_OF_CLASSES = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__slots__",
    "__abstractmethods__", "_abc_impl", "__orig_bases__", "__parameters__",
}  # fmt: skip
NOT_READ_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}


class Unreadable(Exception):
    """A value acts on a run, but what it does cannot be read; the message names it."""


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


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# Containers and plain things


def array_parts(digest: Digest, value: Any) -> Parts:
    if value.dtype.hasobject:
        return [value.dtype.str, value.shape, value.reshape(-1).tolist()]
    return [value.dtype.str, value.shape, np.ascontiguousarray(value).tobytes()]


def mapping_parts(digest: Digest, value: Any) -> Parts:
    factory = getattr(value, "default_factory", None)
    return [factory, *(part for item in value.items() for part in item), *attributes(value)]


def sequence_parts(digest: Digest, value: Any) -> Parts:
    return [len(value), *value, *attributes(value)]


def set_parts(digest: Digest, value: Any) -> Parts:
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


def object_parts(digest: Digest, value: Any) -> Parts:
    """Take an object of any class apart.

    Raises:
        Unreadable: it is of compiled code and cannot be copied, such as an open file or a thread.
    """
    return attributes(value)


# Code


def function_parts(digest: Digest, value: Any) -> Parts:
    """Code, defaults, closure and attributes; of what is no library, source and what it calls as well."""
    code = value.__code__
    parts = [
        value.__module__, value.__qualname__, code, value.__defaults__, value.__kwdefaults__, vars(value),
        *(value.__closure__ or ()),
    ]  # fmt: skip
    if digest.is_library(code.co_filename):
        return parts
    parts.append(source_of(code.co_filename))
    known, package = value.__globals__, value.__globals__.get("__package__") or ""
    for name in sorted(names_in(code)):
        if name in known:
            parts += [name, followed(known[name])]
        parts += [sys.modules[m] for m in (name, f"{package}.{name}") if m in sys.modules]
    return parts


def names_in(code: types.CodeType) -> set[str]:
    """Return the global names and attributes that code mentions, and the code inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(names_in, inner))


def followed(value: Any) -> Any:
    """Return a global value if it is code or plain data, else only the name of its class.

    Through other global objects a function could reach the whole program, such as its server.
    """
    code = (
        types.FunctionType,
        type,
        types.ModuleType,
        functools.partial,
        Tensor,
        np.ndarray,
        *BUILTIN,
    )
    return value if isinstance(value, code) or is_data(value) else name_of(type(value))


def is_data(value: Any, depth: int = 0) -> bool:
    """Return whether a value is plain, or a container of such values."""
    if type(value) in PLAIN or isinstance(value, (Enum, np.generic)):
        return True
    if depth > 8 or type(value) not in (dict, list, tuple, set, frozenset):
        return False
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return all(is_data(part, depth + 1) for part in inner)


def code_parts(digest: Digest, code: Any) -> Parts:
    """All that makes code do what it does; not where it stands."""
    return [
        code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags,
        getattr(code, "co_exceptiontable", b""),
    ]  # fmt: skip


def cell_parts(digest: Digest, cell: Any) -> Parts:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def class_parts(digest: Digest, cls: Any) -> Parts:
    """A library's class counts by its name; others by their source and what stands in them."""
    file = file_of_module(cls.__module__)
    parts = [cls.__module__, cls.__qualname__]
    library = cls.__module__ in sys.builtin_module_names or digest.is_library(file)
    if library and is_found(cls):
        return parts
    parts.append("" if library else source_of(file))
    inside = {name: x for name, x in vars(cls).items() if name not in NOT_READ_OF_CLASSES}
    for name in sorted(inside):
        if not isinstance(inside[name], DESCRIPTORS):
            of = isinstance(inside[name], WRAPPED)
            parts += [name, inside[name] if of else followed(inside[name])]
    return [*parts, *cls.__bases__]


def is_found(cls: type) -> bool:
    """Return whether a class is what its module has under its name, not one made by `type()`."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def module_parts(digest: Digest, value: Any) -> Parts:
    file = getattr(value, "__file__", None) or ""
    return [value.__name__, "" if digest.is_library(file) else source_of(file)]


def builtin_parts(digest: Digest, value: Any) -> Parts:
    owner = getattr(value, "__self__", None)
    return [
        getattr(value, "__module__", None),
        getattr(value, "__qualname__", value.__name__),
        None if isinstance(owner, types.ModuleType) else owner,
        getattr(value, "__objclass__", None),
    ]


def file_of_module(name: str) -> str:
    return getattr(sys.modules.get(name), "__file__", None) or ""


def source_of(file: str) -> str:
    """Return a hash of a source file, the size of a compiled one, or "" if there is none."""
    try:
        status = Path(file).stat()
        if not file.endswith(".py"):
            return str(status.st_size)
        return source_at(file, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError):
        return ""


@functools.lru_cache(maxsize=4096)
def source_at(file: str, changed: int, size: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# Modules of networks


def network_parts(digest: Digest, value: Any) -> Parts:
    """A module's class, weights, buffers and attributes, and those of all modules in it.

    Raises:
        Unreadable: it is compiled for TorchScript.
    """
    if isinstance(value, torch.jit.ScriptModule):
        raise Unreadable("a module compiled for TorchScript")
    parts: Parts = [type(value)]
    for name in sorted(set(vars(value)) - NOT_READ_OF_MODULES - digest.ignored):
        held = vars(value)[name]
        hooks = name.endswith("_hooks") and isinstance(held, Mapping)
        parts += [name, list(held.values()) if hooks else held]  # hooks are counted by the process
    for group in ("_parameters", "_buffers", "_modules"):
        parts.append(dict(vars(value)[group]))
    return parts


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
