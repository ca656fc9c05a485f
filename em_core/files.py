"""Files on disk: safetensors with a JSON description, written to a temporary file and then renamed.

Each holds a SHA-256 of its tensors and its description, which is checked when it is read: safetensors
itself notices that a file is cut, but not that a bit of it has changed.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import Notice, UserError

DESCRIPTION, CHECKSUM = "visual_concepts", "sha256"
OWN = re.compile(
    r"visual-concepts (.+) (\d+)"
)  # a kind of ours: its name, and the number of its format
NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}  # some network folders have none
REPLACE_TRIES, REPLACE_SECONDS, READ_TRIES = 5, 0.05, 10


Writer = Callable[[Path], object]
Content = TypeVar("Content")


def write_aside(path: Path, write: Writer) -> None:
    """Let `write` fill a file next to `path`, then rename it, so that `path` is complete or unchanged.

    The content is on the disk before the name is, so that this also holds if the power fails.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    write_together({path: write})


def write_together(writers: Mapping[Path, Writer]) -> None:
    """Write several files as :func:`write_aside` does, and rename none before all are on the disk.

    Raises:
        UserError: a folder cannot be written to, or the disk is full.
    """
    asides = {path: aside_of(path) for path in writers}
    path = next(iter(writers), Path())
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(asides[path])
            flush_to_disk(asides[path])
            os.chmod(asides[path], usual_mode())  # safetensors makes files for their owner alone
        for path, aside in asides.items():
            replace_file(aside, path)
        for folder in {path.parent for path in writers}:
            with suppress(
                OSError
            ):  # Windows opens no folders; the files themselves are safe by now
                flush_to_disk(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Could not write {path}: {error}. Choose a writable folder with enough free space."
        ) from error
    finally:
        for aside in asides.values():
            with suppress(OSError):
                os.unlink(aside)


def aside_of(path: Path) -> Path:
    """Return a name beside `path` that no other file has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")


def write_folder(target: Path, writers: Mapping[str, Writer]) -> None:
    """Write a folder's files into one beside it, which then takes its name: it is whole, or as it was.

    Args:
        target: the folder; what it held before is replaced.
        writers: relative path, with "/" -> what fills the file there.

    Raises:
        UserError: it cannot be written to, or the disk is full.
    """
    aside, former = aside_of(target), aside_of(target)
    path = target
    try:
        for name, write in writers.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            flush_to_disk(path)
        if target.exists():
            os.replace(target, former)
        os.replace(aside, target)
    except OSError as error:
        if former.exists() and not target.exists():
            os.replace(former, target)
        raise UserError(
            f"Could not write {path}: {error}. Nothing is left of it. Choose a writable folder with enough free "
            "space."
        ) from error
    finally:
        for left in (aside, former):
            shutil.rmtree(left, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk itself.

    Raises:
        OSError: it could not be written, for instance because the disk is full.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(handle)


def replace_file(source: Path, target: Path) -> None:
    """Rename a file over another, waiting a moment for who just reads that one (which Windows minds).

    Raises:
        OSError: the target is in use for longer, or cannot be written.
    """
    for left in reversed(range(REPLACE_TRIES)):
        try:
            return os.replace(source, target)
        except PermissionError:
            if left == 0:
                raise
            time.sleep(REPLACE_SECONDS)


def usual_mode() -> int:
    """Return the permissions of a new file under the process's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: Path, text: str) -> None:
    """Write a text file, in full or not at all."""

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    write_aside(path, write)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, in full or not at all; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], kind: str, plain: Mapping[str, Any]
) -> None:
    """Write tensors and JSON values as one safetensors file of the given kind.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    clean = {name: own_copy(tensor.detach()) for name, tensor in tensors.items()}
    described = {"kind": kind, **plain}
    described[CHECKSUM] = checksum(clean, described)
    # One text alone: safetensors writes several in any order, and equal files ought to be equal.
    header = {DESCRIPTION: json.dumps(described)}
    write_aside(path, lambda aside: save_file(clean, aside, metadata=header))


def order_metadata(path: Path) -> None:
    """Sort the texts in a safetensors file's header, which has them in an order that differs each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it is, but for escapes that JSON leaves open
            file.seek(8)
            file.write(text.ljust(size))


def own_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with `tensor`."""
    moved = tensor.cpu().contiguous()
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def checksum(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """Return a SHA-256 of the tensors' names, types, shapes and values, and of the JSON values."""
    digest = hashlib.sha256(json.dumps(described).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def read_tensors(
    path: Path, kind: str, unchecked: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and JSON values of a file that :func:`write_tensors` wrote.

    The tensors are in memory of their own: on Windows, a file that is still mapped can be neither
    replaced nor deleted.

    Args:
        path: the file.
        kind: the kind it must be of.
        unchecked: a kind from before there were checksums; a file of this kind is read with a warning.

    Raises:
        UserError: the file does not exist, is not safetensors, is cut or damaged, is of a different
            kind, or has values that are not finite.
    """
    header, tensors = read_safetensors(path, kind, tensor_copies)
    plain = describe(path, header, kind, unchecked)
    require_checksum(path, tensors, plain, optional=plain["kind"] == unchecked)
    require_finite(path, tensors)
    del plain["kind"]
    return tensors, plain


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """Read the JSON values of a file alone, without its tensors and without checking them.

    Raises:
        UserError: the file does not exist, is not safetensors, or is of a different kind.
    """
    return read_outline(path, kind)[1]


def read_outline(
    path: Path, kind: str, unchecked: str | None = None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Read the names of a file's tensors and its JSON values, without the tensors and without checking
    them. For the arguments and errors, see :func:`read_tensors`."""
    header, names = read_safetensors(path, kind, tensor_names)
    return names, describe(path, header, kind, unchecked)


def tensor_names(file: Any) -> tuple[str, ...]:
    """The names of the tensors in an open file."""
    return tuple(file.keys())


def tensor_copies(file: Any) -> dict[str, Tensor]:
    """Copies of the tensors in an open file."""
    return {name: file.get_tensor(name).clone() for name in tensor_names(file)}


def read_safetensors(
    path: Path, kind: str, content: Callable[[Any], Content]
) -> tuple[dict[str, str], Content]:
    """Return the texts in a file's header and what `content` reads of the open file.

    safetensors opens a file by its name twice. If another process replaces it in between, what was read
    is of neither file, so it is read again.

    Raises:
        UserError: the file does not exist or is not safetensors.
    """
    for left in reversed(range(READ_TRIES)):
        before = state_on_disk(path)
        if before is None:
            raise UserError(f"No file {path}. Expected {article(kind)} file (.safetensors).")
        try:
            with safe_open(path, framework="pt") as file:
                read = file.metadata() or {}, content(file)
            if state_on_disk(path) == before:
                return read
        except UNREADABLE as error:
            if left == 0 or state_on_disk(path) == before:
                raise UserError(
                    f"{path} is not a complete safetensors file ({error}). It may be cut off, or in a "
                    "different format under this name; pickled files are never opened. Save it again."
                ) from error
    raise UserError(f"{path} is being written all the time. Wait until that has ended.")


def state_on_disk(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced or written to; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    same = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return same if stat.S_ISREG(status.st_mode) else None


# What safetensors raises of headers that are wrong in one way or another, besides its own error.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError)


def require_checksum(
    path: Path, tensors: Mapping[str, Tensor], plain: dict[str, Any], *, optional: bool
) -> None:
    """Refuse a file that is not as it was written; the checksum is taken out of `plain`.

    Raises:
        UserError: the checksum is wrong, or there is none though it is not `optional`.
    """
    written = plain.pop(CHECKSUM, None)
    if written is None and optional:
        warnings.warn(
            f"{path} has no checksum, since it was saved by an older version: if it was damaged since, "
            "that goes unnoticed. Save it again.",
            Notice,
            stacklevel=4,
        )
    elif written != checksum(tensors, plain):
        raise UserError(
            f"{path} is damaged: its checksum is not that of its content. Take a copy of it, or save it "
            "again."
        )


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse values that are NaN or infinite.

    Raises:
        UserError: there are such values; the message names the first tensor that has one.
    """
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"{path} is damaged: it has values that are not finite in {name}. Save it again."
            )


def article(kind: str) -> str:
    """Return a kind of file as people call it, with its article, which some have already."""
    own = OWN.fullmatch(kind)
    named = own[1] if own else kind
    return named if named.startswith(("a ", "an ")) else f"a {named}"


def describe(
    path: Path, header: Mapping[str, str], kind: str, unchecked: str | None
) -> dict[str, Any]:
    """Return the JSON values in a file's header, its kind among them.

    Raises:
        UserError: the file is of a different kind.
    """
    try:
        plain = json.loads(header.get(DESCRIPTION, "{}"))
    except (ValueError, RecursionError):  # long numbers, and lists in lists, in a damaged header
        plain = {}
    found = plain.get("kind") if isinstance(plain, dict) else None
    if found is None or found not in (kind, unchecked):
        raise UserError(f"{path} is {described(found, kind)}. Expected {article(kind)} file.")
    return plain


def described(found: object, kind: str) -> str:
    """Return what a file is that is not of the kind it must be of.

    Args:
        found: the kind that it tells; None if it tells none.
        kind: the kind that was expected.
    """
    own = OWN.fullmatch(str(found))
    if own is None:
        return "some other safetensors file"
    expected = OWN.fullmatch(kind)
    if expected and own[1] == expected[1]:
        return f"{article(own[0])} file of another version of Visual Concepts (format {own[2]}, not {expected[2]})"
    return f"{article(own[0])} file of Visual Concepts"
