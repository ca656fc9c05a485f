"""Reads mutated concept files as a user's program does: `python damaged.py FOLDER COUNT checksum|none`."""

import json
import random
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from equality import differences
from mutations import WAYS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from em_core import ConceptSet, UserError
from em_core.files import CHECKSUM, DESCRIPTION
from em_core.model.identity import ModelIdentity
from em_core.prompts import Concept
from em_core.runs.concept_set import WITHOUT_CHECKSUM

SECONDS = 20


def concept_set(large: int = 8) -> ConceptSet:
    """Two concepts with vectors for two encoders, a LoRA, masks and curves."""
    g = torch.Generator().manual_seed(0)
    encoders = {"clip_l": 6, "clip_g": large}
    vectors = {
        name: {encoder: torch.randn(2, d, generator=g) for encoder, d in encoders.items()}
        for name in ("rex", "doll")
    }
    layer = "unet.mid_block.attentions.0.to_q"
    shapes = {"lora_down": (2, large), "lora_up": (large, 2)}
    return ConceptSet(
        concepts=(Concept("rex", "old dog"), Concept("doll")),
        vectors=vectors,
        identity=ModelIdentity("sdxl", "ab12", encoders, torch.randn(5, generator=g)),
        weights={f"{layer}.{n}": torch.randn(s, generator=g).half() for n, s in shapes.items()},
        lora_scale=0.25,
        prompts=("a photo of <rex:old dog> and <doll>",),
        masks=({name: torch.rand(8, 8, generator=g) > 0.5 for name in vectors},),
        settings={"em": {"steps": 3, "seed": 1}, "joint": {"kind": "lora"}},
        curves={"loss/total": ((1, 0.5), (2, 0.25)), "area/rex": ((2, 0.125),)},
        truth="0f",
    )


def without_checksum(path: Path) -> None:
    """Write the file again as it was before there were checksums."""
    with safe_open(path, framework="pt") as file:
        plain = json.loads(file.metadata()[DESCRIPTION])
    plain["kind"] = WITHOUT_CHECKSUM
    plain.pop(CHECKSUM)
    save_file(load_file(path), path, metadata={DESCRIPTION: json.dumps(plain)})


@contextmanager
def not_for_ever() -> Iterator[None]:
    """End what hangs, where the system can."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"not read after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_mutated(folder: Path, count: int, *, checked: bool) -> Counter[str]:
    """Read so many mutated files; how many were refused, and how many loaded as they were saved.

    Files without a checksum cannot be told from others of their kind, but they are never read
    without a warning.
    """
    whole, file, seen = concept_set(), folder / "x.safetensors", Counter[str]()
    whole.save(file)
    if not checked:
        without_checksum(file)
    data = file.read_bytes()
    for number in range(count):
        way = list(WAYS)[number % len(WAYS)]
        mutated = WAYS[way](data, random.Random(f"{checked} {number}"))  # noqa: S311
        file.write_bytes(mutated)
        with warnings.catch_warnings(record=True) as told, not_for_ever():
            warnings.simplefilter("always")
            try:
                found = ConceptSet.load(file)
            except UserError:
                seen[f"{way}: refused"] += 1
                continue
        same = not differences(found, whole)
        warned = any("no checksum" in str(warning.message) for warning in told)
        assert (warned or same) and warned != checked, f"mutation {number} ({way}) was read"
        seen[f"{way}: {'as saved' if same else 'with a warning'}"] += 1
    return seen


if __name__ == "__main__":
    folder, count, kind = sys.argv[1:]
    seen = read_mutated(Path(folder), int(count), checked=kind == "checksum")
    sys.stdout.write(json.dumps(seen, sort_keys=True))
