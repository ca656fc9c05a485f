"""Errors whose messages are written for the person who uses the pack."""

import torch

# torch 2.5 introduced the name without "cuda".
OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class UserError(ValueError):
    """An error whose message tells the user what is wrong, what was expected, and what to do."""


class Notice(UserWarning):
    """A warning whose message tells the user what they should know."""


class StoreWarning(Notice):
    """Something could not be kept for later; the run itself is not affected."""


class TrainingError(RuntimeError):
    """Training could not continue; the last good state is kept."""


def require(what: str, value: object, fine: bool, expected: str) -> None:
    """Raise a UserError unless `fine`."""
    if not fine:
        raise UserError(f"Bad {what}. Expected {expected}, got {value!r}.")
