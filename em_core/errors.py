"""Errors whose message is written for the person who uses the pack."""

import torch

# The name without "cuda" came with torch 2.5.
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class UserError(ValueError):
    """An error whose message is meant for the user: what was expected, what came, what to do."""


class TrainingError(RuntimeError):
    """Training could not go on; the last good state is kept."""


def require(what: str, value: object, fine: bool, expected: str) -> None:
    """Raise a UserError unless `fine`."""
    if not fine:
        raise UserError(f"Bad {what}. Expected {expected}, got {value!r}.")
