"""Write docs/memory.md from results/memory.jsonl: what each plan needs, and the smallest card for it.

    python benchmarks/memory.py            the document from the counts that are there
    python benchmarks/memory.py --count    counts again first, in ComfyUI's Python (some ten minutes)

A line of the counts is one family, size, kind and plan: the peak of tensors in real steps at full size,
and what the model of memory (em_core/model/memory.py) says of it. tests/host/test_memory.py holds both
to each other.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_core.model.memory import FAMILIES, KINDS

ROOT = Path(__file__).parents[1]
COUNTS, DOCUMENT = ROOT / "benchmarks" / "results" / "memory.jsonl", ROOT / "docs" / "memory.md"
GIB = 2**30
LEARNED = KINDS | {"visual": "visual condition"}
CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 48, 80)
DESKTOP = 0.7  # GiB that a driver and a desktop take of a card, assumed
HEAD = """# What learning needs of a graphics card

Written by `benchmarks/memory.py`; do not edit. *Counted* is the peak of all tensors in real steps of
ComfyUI's own classes at full size, on torch's meta device, with attention that keeps what every fused
kernel keeps; it needs no graphics card. *Estimated* is what the nodes and the command line go by; it is
held to a count of diffusers' classes too. *Free* is the estimate and a reserve for what no tensor shows
(the CUDA context, workspaces, fragmentation): 0.5 GiB and 4%. Thirty-five of these cases were run on a card
of which no more than that was free, the context apart (`benchmarks/results/card.md`). All ran but SDXL's
cross-attention, recomputing, whose estimate left out the end of the backward pass and is higher by 0.5 GiB
now; it has not been run again. The card is the smallest on which that is free when a desktop takes {desktop}
GiB, by the estimate alone.

Batch 1, two concepts, a prompt of at most 75 pieces. Text encoders are in fp16, as checkpoints have
them. *float32* is for cross-attention and all weights; *recomputing* takes longer; *fp8* is the type in
which the UNet's matrices rest, not that of the computation.

| family | pixels | learns | plan | weights | step | counted | estimated | free | card |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def count() -> None:
    """Count the whole grid in ComfyUI's Python and keep the lines."""
    sys.path.insert(0, str(ROOT / "tests" / "host"))
    from found import FOUND, run_script
    from test_memory import GRID

    if not FOUND:
        sys.exit("No ComfyUI found; see CONTRIBUTING.md.")
    said = run_script(FOUND[0], "counted.py", *GRID, timeout=7200)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    COUNTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def card(need: float) -> str:
    """The smallest card on which so many bytes are free."""
    fit = [size for size in CARDS if size - DESKTOP >= need / GIB]
    return f"{fit[0]} GB" if fit else "none"


def row(found: dict[str, Any]) -> str:
    """One line of the table, in GiB."""
    parts = found["parts"]
    step = parts["trained"] + parts["saved"] + parts["working"]
    sizes = (found["weights"], step, found["peak"], found["estimate"], found["need"])
    cells = [
        FAMILIES[found["family"]],
        str(found["side"]),
        LEARNED[found["kind"]],
        found["plan"],
        *(f"{size / GIB:.1f}" for size in sizes),
        card(found["need"]),
    ]
    return f"| {' | '.join(cells)} |\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Count if asked to, then write the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", action="store_true", help="count again first")
    if parser.parse_args(argv).count:
        count()
    found = [json.loads(line) for line in COUNTS.read_text(encoding="utf-8").splitlines()]
    worst = max(abs(one["estimate"] / one["peak"] - 1) for one in found)
    tail = f"\nOf {len(found)} cases, the estimate is off by {worst:.1%} at most.\n\n{encoding(found)}\n"
    text = HEAD.format(desktop=DESKTOP) + "".join(map(row, found)) + tail
    DOCUMENT.write_text(text, encoding="utf-8")


def encoding(found: Sequence[dict[str, Any]]) -> str:
    """What the pictures' encoding takes, which comes before all of the table."""
    of_side = {one["side"]: (one["encoded"], one["parts"]["encoding"]) for one in found}
    sizes = ", ".join(
        f"{counted / GIB:.1f} GiB at {side} px ({estimated / GIB:.1f} estimated)"
        for side, (counted, estimated) in sorted(of_side.items())
    )
    ever = [one for one in found if one["encoded"] >= one["peak"]]
    most = f"In {len(ever)} cases that is" if ever else "In none of the cases is that"
    text = (
        "Before that, when nothing else is on the card, each picture is encoded. In float32, which takes "
        f"the most, and with the VAE's weights that is {sizes}. {most} the most that the run takes; the "
        "estimate is the larger of both."
    )
    return textwrap.fill(text, 104)


if __name__ == "__main__":
    main()
