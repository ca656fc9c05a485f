"""The state of a run as a file, with every field it has."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_description, read_tensors, write_tensors
from ..method.state import PictureState, RunState
from .truth import without_iou

KIND = "visual-concepts run state 5"
Value = TypeVar("Value")
TENSOR = "$tensor"  # no name of a concept, encoder or curve starts with "$"


@dataclass(frozen=True)
class StateFile:
    """Where a run's state is kept, so that a stopped run can be continued.

    Attributes:
        path: path of the file.
        key: key of the run, see :func:`em_core.runs.key.run_key`; a state continues only the run that
            it came from.
        truth: digest of the true masks that its IoU curves compare with.
    """

    path: Path
    key: str
    truth: str = ""

    def exists(self) -> bool:
        return self.path.is_file()

    def save(self, state: RunState) -> None:
        """Write the state as safetensors, in full or not at all.

        Raises:
            UserError: the folder cannot be written to, or the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        plain = {
            "key": self.key,
            "truth": self.truth,
            "state": flatten(state, "state", tensors),
        }
        write_tensors(self.path, tensors, KIND, plain)

    def load(self, device: torch.device) -> RunState:
        """Read the state, with its tensors on `device`; IoU with other true masks is left out.

        Raises:
            UserError: the file is not a state, is damaged, or belongs to a different run.
        """
        tensors, plain = read_tensors(self.path, KIND)
        if plain.get("key") != self.key:
            raise UserError(
                f"{self.path} belongs to a run with other pictures, prompts, masks or settings, other concepts to "
                "start from, a different model or another version of this package. Resume with the same ones, or "
                "start a new run in another folder."
            )
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        try:
            values = unflatten(plain["state"], moved)
            pictures = tuple(whole(PictureState, picture) for picture in values.pop("pictures"))
            state = whole(RunState, values | {"pictures": pictures})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} does not hold the whole state of a run ({error!r}). It is "
                "damaged or from a different version. Delete it and start the run again."
            ) from error
        if plain.get("truth") != self.truth:
            state = replace(state, curves=without_iou(state.curves))
        return state

    def holds(self, state: RunState) -> bool:
        """Return whether the file is there and holds the run as far as `state`."""
        try:
            saved = read_description(self.path, KIND)
        except UserError:
            return False
        at = saved.get("state", {})
        return saved.get("key") == self.key and (at.get("phase"), at.get("step")) == (
            state.phase,
            state.step,
        )

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value as JSON; its tensors are moved to `tensors`, under the paths they had."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if is_dataclass(value):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, Mapping):
        return {name: flatten(part, f"{path}/{name}", tensors) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(part, f"{path}/{index}", tensors) for index, part in enumerate(value)]
    return value


def whole(kind: type[Value], values: Mapping[str, Any]) -> Value:
    """Build a dataclass from exactly its fields.

    Raises:
        KeyError: a field is missing, or there is one that the dataclass does not have.
    """
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if names != set(values):
        raise KeyError(*sorted(names ^ set(values)))
    return kind(**values)


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`flatten`, except that dataclasses become dicts, and lists become tuples."""
    if isinstance(plain, dict):
        if TENSOR in plain:
            return tensors[plain[TENSOR]]
        return {name: unflatten(part, tensors) for name, part in plain.items()}
    return tuple(unflatten(part, tensors) for part in plain) if isinstance(plain, list) else plain
