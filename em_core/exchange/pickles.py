"""Pickled files, which may run any code when they are opened: refused, with the command that converts them."""

from pathlib import Path

from ..errors import UserError

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt", ".pkl")
# `weights_only` makes torch build tensors and nothing else.
COMMAND = (
    "python -c \"import sys, torch, safetensors.torch as s; d = torch.load(open(sys.argv[1], 'rb'), 'cpu', "
    "weights_only=True); "
    "s.save_file({k: v.detach().clone() for k, v in d.get('string_to_param', d).items() if hasattr(v, 'shape')}, "
    'sys.argv[2])"'
)


def refuse_pickle(path: Path) -> None:
    """Refuse a file that is pickled, by its name or its first bytes.

    Raises:
        UserError: it is; the message has the one command that converts it.
    """
    if path.suffix.lower() in SUFFIXES or looks_pickled(path):
        target = path.with_suffix(".safetensors")
        target = target.with_stem(f"{path.stem}_converted") if target == path else target
        raise UserError(
            f"{path} is a pickled file, which may run any code when it is opened, so it never is here. Expected "
            f'.safetensors. If you trust it, convert it once: {COMMAND} "{path}" "{target}"'
        )


def looks_pickled(path: Path) -> bool:
    """Return whether a file begins as pickles do, or the archives that torch puts them into."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    if start[8:] == b"{":  # safetensors, whose first bytes are a length and may be any
        return False
    return start[:2] == b"PK" or (
        start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    )
