"""Files on disk: safetensors with a JSON description, written to a temporary file and then renamed."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError

DESCRIPTION = "visual_concepts"


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file next to `path`, then rename it, so that `path` is complete or unchanged.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.chmod(aside, usual_mode())  # safetensors makes files that their owner alone can read
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"Could not write {path}: {error}. Choose a writable folder with enough free space."
        ) from error
    finally:
        if os.path.isfile(aside):
            os.unlink(aside)


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
    path: Path,
    tensors: Mapping[str, Tensor],
    kind: str,
    plain: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and JSON values as one safetensors file of the given kind."""
    description = json.dumps({"kind": kind, **plain})
    clean = {name: own_copy(tensor.detach()) for name, tensor in tensors.items()}
    header = {DESCRIPTION: description, **(metadata or {})}
    write_aside(path, lambda aside: save_file(clean, aside, metadata=header))


def own_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares no memory with `tensor`."""
    moved = tensor.cpu().contiguous()
    return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and JSON values of a file that :func:`write_tensors` wrote.

    Raises:
        UserError: the file does not exist, is not safetensors, is truncated, is of a different kind,
            or has values that are not finite.
    """
    if not os.path.isfile(path):
        raise UserError(f"No file {path}. Expected a {kind} file (.safetensors).")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated, or in a different "
            "format under this name; pickled files are never opened. Save it again."
        ) from error
    plain = described(path, header, kind)
    broken = sorted(
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    )
    if broken:
        raise UserError(
            f"{path} is damaged: it has values that are not finite in {broken[0]}. Save it again."
        )
    return tensors, plain


def described(path: Path, header: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Return the JSON values in a file's header.

    Raises:
        UserError: the file is of a different kind.
    """
    try:
        plain = json.loads(header.get(DESCRIPTION, "{}"))
    except json.JSONDecodeError:
        plain = {}
    found = plain.pop("kind", None) if isinstance(plain, dict) else None
    if found != kind:
        what = f"a {found} file" if found else "some other safetensors file"
        raise UserError(f"{path} is {what}. Expected a {kind} file.")
    return plain
