"""How code is taken apart for a hash: functions with what they call, classes and modules."""

import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .digest_values import BUILTIN, PLAIN, Parts, Reading, Unreadable, name_of

DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
WRAPPED = (staticmethod, classmethod, property, functools.cached_property)
NOT_READ_OF_CLASSES = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__slots__",
    "__abstractmethods__", "_abc_impl", "__orig_bases__", "__parameters__",
}  # fmt: skip
NOT_READ_OF_MODULES = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def function_parts(digest: Reading, value: Any) -> Parts:
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


def code_parts(digest: Reading, code: Any) -> Parts:
    """All that makes code do what it does; not where it stands."""
    return [
        code.co_code, code.co_consts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
        code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags,
        getattr(code, "co_exceptiontable", b""),
    ]  # fmt: skip


def cell_parts(digest: Reading, cell: Any) -> Parts:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def class_parts(digest: Reading, cls: Any) -> Parts:
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


def module_parts(digest: Reading, value: Any) -> Parts:
    file = getattr(value, "__file__", None) or ""
    return [value.__name__, "" if digest.is_library(file) else source_of(file)]


def builtin_parts(digest: Reading, value: Any) -> Parts:
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


def network_parts(digest: Reading, value: Any) -> Parts:
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
