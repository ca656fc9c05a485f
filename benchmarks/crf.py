"""Time and memory of the DenseCRF: torch against pydensecrf, and a GPU against the CPU.

    python benchmarks/crf.py                  # CPU, one and two threads; about 5 minutes
    python benchmarks/crf.py --device cuda    # the same table on a GPU

All runs of a round are interleaved in one process and compared as ratios within the round, so that
a drift in the machine's speed does not matter. A solve includes everything from the picture and the
masks to the marginals; nothing is reused from an earlier one. Results: benchmarks/results/crf*.json
and .md.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from crf_data import first_masks, photo_folders, read_photo, table, write
from torch import Tensor

from em_core.masks.crf import CUTLER, DenseCRF, MaskRefiner
from em_core.masks.crf.mean_field import cached_gaussian

PYDENSECRF = replace(CUTLER, backend="pydensecrf")


@dataclass
class Timings:
    """Seconds of each round.

    Attributes:
        reference: a whole solve by pydensecrf on the CPU.
        whole: a whole solve by torch.
        build: building both lattices with torch.
        again: another solve of the same picture by torch.
    """

    reference: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    build: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call, including the work that it queues on the device."""
    synchronise(device)
    started = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_round(image: Tensor, masks: Tensor, device: torch.device, timings: Timings) -> None:
    """Time each kind of run once."""
    on_device, on_device_masks = image.to(device), masks.to(device)
    timings.reference.append(seconds(lambda: MaskRefiner(image, PYDENSECRF)(masks), device))
    cached_gaussian.cache_clear()
    timings.whole.append(seconds(lambda: MaskRefiner(on_device, CUTLER)(on_device_masks), device))
    cached_gaussian.cache_clear()
    refiner = MaskRefiner(on_device, CUTLER)
    timings.build.append(seconds(lambda: DenseCRF.of_image(refiner.image, CUTLER), device))
    refiner(on_device_masks)
    timings.again.append(seconds(lambda: refiner(on_device_masks), device))


def measure(side: int, labels: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Medians over the rounds, which take the photos in turn."""
    timings, photos = Timings(), [read_photo(folder, side) for folder in photo_folders()]
    one_round(photos[0][0], first_masks(photos[0][1], labels - 1), device, Timings())
    for i in range(rounds):
        image, masks = photos[i % len(photos)]
        one_round(image, first_masks(masks, labels - 1), device, timings)
    ratios = [ours / theirs for ours, theirs in zip(timings.whole, timings.reference, strict=True)]
    median = {name: 1e3 * statistics.median(values) for name, values in vars(timings).items()}
    return {**median, "ratio": statistics.median(ratios), "best": min(ratios), "worst": max(ratios)}


def peak(backend: str, side: int, labels: int) -> None:
    """Print the peak memory of a solve, in MB beyond what the process used before."""
    torch.set_num_threads(1)
    image, masks = read_photo(photo_folders()[1], side)
    masks = first_masks(masks, labels - 1)
    settings = CUTLER if backend == "torch" else PYDENSECRF
    MaskRefiner(image[:, :32, :32], settings)(masks[:, :32, :32])
    cached_gaussian.cache_clear()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    MaskRefiner(image, settings)(masks)
    print((status("VmHWM") - before) / 1024)


def status(name: str) -> int:
    """A value from /proc/self/status, in kB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1])


def peak_of(backend: str, side: int, labels: int) -> float:
    """The result of `peak` in a separate process."""
    command = [sys.executable, __file__, "--peak", backend, str(side), str(labels)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def time_table(rows: list[dict[str, float]]) -> str:
    head = ["side", "labels", "threads", "pydensecrf ms", "torch ms", "build ms", "again ms"]
    head += ["ratio, median", "best to worst"]
    cells = [
        [f"{row[k]:.0f}" for k in ("side", "labels", "threads", "reference")]
        + [f"{row[k]:.1f}" for k in ("whole", "build", "again")]
        + [f"{row['ratio']:.2f}", f"{row['best']:.2f} to {row['worst']:.2f}"]
        for row in rows
    ]
    return table(head, cells)


def memory_table(rows: list[dict[str, float]]) -> str:
    names = ("side", "labels", "pydensecrf", "torch")
    cells = [
        [*(f"{row[k]:.0f}" for k in names), f"{row['torch'] / row['pydensecrf']:.2f}"]
        for row in rows
    ]
    return table(["side", "labels", "pydensecrf MB", "torch MB", "ratio"], cells)


def memory_rows(sides: list[int], labels: list[int]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for side in sides:
        for count in labels:
            row = {backend: peak_of(backend, side, count) for backend in ("pydensecrf", "torch")}
            rows.append({"side": side, "labels": count, **row})
    return rows


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return f"torch {torch.__version__}, {device.type} {name}, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
    device = torch.device(args.device)
    rows: list[dict[str, float]] = []
    for side in args.sides:
        for labels in args.labels:
            for threads in args.threads:
                torch.set_num_threads(threads)
                found = measure(side, labels, args.rounds, device)
                rows.append({"side": side, "labels": labels, "threads": threads, **found})
                print(time_table(rows[-1:]).splitlines()[-1], flush=True)
    report = {"machine": describe(device), "rounds": args.rounds, "time": rows}
    text = (
        f"# DenseCRF, 10 iterations, CutLER's numbers\n\n{report['machine']}\n\n{time_table(rows)}"
    )
    if device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        report["memory"] = memory_rows(args.sides, args.labels)
        text += f"\n## Memory at the peak of a solve\n\n{memory_table(report['memory'])}"
    name = "crf" if device.type == "cpu" else f"crf_{device.type}"
    write(f"{name}.json", json.dumps(report, indent=1) + "\n")
    write(f"{name}.md", text)


if __name__ == "__main__":
    main()
