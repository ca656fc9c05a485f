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


class MemoryNotice(Notice):
    """What a run needs of a device's memory, and how it will spend it."""


def require(what: str, value: object, fine: bool, expected: str) -> None:
    """Raise a UserError unless `fine`."""
    if not fine:
        raise UserError(f"Bad {what}. Expected {expected}, got {value!r}.")


OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "STATUS_ALLOC_FAILED",
    "STATUS_NOT_INITIALIZED",  # cuBLAS, where its workspace found no room
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in any of torch's ways, that memory ran out; also where another was
    raised from it."""
    if isinstance(error, (OUT_OF_MEMORY, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(w in str(error) for w in OUT_OF_MEMORY_WORDS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
