"""Models by their names, and one of them kept from job to job."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from ..demo import model_path
from ..errors import UserError, is_out_of_memory
from ..hosts.diffusers import DiffusersHost
from ..hosts.loading import torch_device
from ..runs.key import model_digest
from .job import Model


@dataclass(frozen=True)
class Facts:
    """What keys and settings need to know of a model.

    Attributes:
        digest: of every weight, the schedule, and what it predicts.
        family: its family.
        error: why it cannot be used, "" if it can.
    """

    digest: str = ""
    family: str = ""
    error: str = ""


def source_of(model: str) -> Path | str:
    """Return the folder, file or name on the hub that `--model` names."""
    return model_path() if model == "demo" else model


def load_host(model: str, device: str = "cpu", dtype: str = "float32") -> DiffusersHost:
    """Load the model that `--model` names.

    Raises:
        UserError: there is no such model or device.
    """
    quiet_libraries()
    place = torch_device(device)
    return DiffusersHost.load(source_of(model), place, dtype)


def quiet_libraries() -> None:
    """Silence loading bars and notes on optional packages; the commands show their own progress."""
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
    except ImportError:
        return  # loading the model reports what is missing


_kept: dict[Model, tuple[DiffusersHost, Facts]] = {}


def host_of(model: Model) -> tuple[DiffusersHost, Facts]:
    """Return a model and its facts; a process keeps the last one, and lets it go for another.

    Raises:
        UserError: there is no such model or device.
    """
    if model not in _kept:
        forget_host()
        host = load_host(model.source, model.device, model.dtype)
        _kept[model] = host, Facts(model_digest(host), host.identity().family)
    return _kept[model]


def forget_host() -> None:
    """Let the kept model go, and give its memory back."""
    _kept.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def facts_of(model: Model) -> Facts:
    """Return a model's facts, or why it cannot be used; it stays loaded for the jobs that follow."""
    try:
        return host_of(model)[1]
    except UserError as error:
        return Facts(error=str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return Facts(error="Not enough memory on the device to load the model.")
