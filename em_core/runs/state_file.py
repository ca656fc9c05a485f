"""The state of a run as a file: every field of it, whatever fields there are."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors, write_tensors
from ..method.state import PictureState, RunState

KIND = "visual-concepts run state 2"
TENSOR = "$tensor"  # no name of a concept, encoder or curve begins so


@dataclass(frozen=True)
class StateFile:
    """Where a run's state is kept, so that a stopped run can go on.

    Attributes:
        path: of the file.
        key: of the run; see :func:`em_core.runs.key.run_key`. A state continues only the run that
            it came from.
    """

    path: Path
    key: str

    def exists(self) -> bool:
        return self.path.is_file()

    def save(self, state: RunState) -> None:
        """Write the state as safetensors, whole or not at all.

        Raises:
            UserError: the folder cannot be written, or the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        plain = {"key": self.key, "state": flatten(state, "state", tensors)}
        write_tensors(self.path, tensors, KIND, plain)

    def load(self, device: torch.device) -> RunState:
        """The state, its tensors on `device`.

        Raises:
            UserError: the file is not a state, is damaged, or belongs to another run.
        """
        tensors, plain = read_tensors(self.path, KIND)
        if plain.get("key") != self.key:
            raise UserError(
                f"{self.path} belongs to a run with other pictures, prompts, settings or model. "
                "Resume with the same inputs, or start a new run in another folder."
            )
        moved = {name: x.to(device) for name, x in tensors.items()}
        try:
            values = unflatten(plain["state"], moved)
            pictures = tuple(PictureState(**picture) for picture in values.pop("pictures"))
            return RunState(pictures=pictures, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} does not hold the whole state of a run ({error!r}). It comes from "
                "another version or is damaged: delete it and start the run again."
            ) from error

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go to `tensors` under the paths at which they stand."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: flatten(x, f"{path}/{name}", tensors) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(x, f"{path}/{i}", tensors) for i, x in enumerate(value)]
    return value


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`flatten`; dataclasses become dicts, and lists tuples."""
    if isinstance(plain, dict):
        if TENSOR in plain:
            return tensors[plain[TENSOR]]
        return {name: unflatten(x, tensors) for name, x in plain.items()}
    return tuple(unflatten(x, tensors) for x in plain) if isinstance(plain, list) else plain
