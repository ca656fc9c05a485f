"""Errors whose messages are written for the person who uses the pack."""

import difflib
import errno
import re
from collections.abc import Iterable

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


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """Return a question after the known name that is most like an unknown one, such as " Did you mean rex?".

    Args:
        name: what is unknown.
        known: what it may have been meant for; upper and lower case are the same.
        form: how the name is to be written, with "{}" in its place.

    Returns:
        The question, with a space before it; "" if no known name is like it.
    """
    by_case = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), by_case, n=1)
    return f" Did you mean {form.format(by_case[close[0]])}?" if close else ""


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


LASTING = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM,
    errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EFBIG,
}  # fmt: skip
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
NATIVE = re.compile(r"\(os error (\d+)\)")  # how safetensors tells an error of the system


def system_error(error: BaseException) -> int | None:
    """Return the number of the system's error that another was raised from; None if there is none."""
    found = error.errno if isinstance(error, OSError) else None
    if found is None and (told := NATIVE.search(str(error))):
        found = int(told[1])
    if found is None and error.__cause__ is not None:
        return system_error(error.__cause__)
    return found


def is_disk_full(error: BaseException) -> bool:
    """Whether an error came of a disk that is full, or of a quota."""
    return system_error(error) in FULL


def is_passing(error: BaseException) -> bool:
    """Whether the same may work at another time: a disk, a network or a machine failed, not the input."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    number = system_error(error)
    if number is not None:
        return number not in LASTING
    return error.__cause__ is not None and is_passing(error.__cause__)
