"""The price of EM: time of an EM run, its first masks included, over a plain token run of as many steps.

    python benchmarks/em_cost.py --rounds 6

Runs are interleaved and compared as ratios within a round, so a machine whose speed drifts does no
harm. "Plain" is mode `none`: the diffusion loss on the tokens, no masks and no attention recorded. Each
round has another scene, of A and B in turn: how much the first masks cost depends on how clear they are.
CPU time is compared; loading is not counted.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from em_core.commands.common import load_host
from em_core.commands.demo import example_of
from em_core.demo.scenes import concept_scene
from em_core.method.problem import Problem, prepare
from em_core.method.start import initialise
from em_core.presets import em_settings
from em_core.runs.runner import run

RESULTS = Path(__file__).parent / "results"


def seconds(problem: Problem) -> float:
    """Time of a whole run."""
    started = time.process_time()
    run(problem, initialise(problem))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    host = load_host("demo")
    em = replace(em_settings(host.identity().family), steps=args.steps)
    arms = {
        "plain": replace(em, mode="none", union_sampling=em.union_sampling),
        "em": em,
        "em, no regions": replace(em, masks=replace(em.masks, regions=None)),
        "em, no CRF": replace(em, masks=replace(em.masks, crf=None)),
    }
    rows = []
    for scene in range(args.rounds):
        example = example_of(concept_scene(scene, "AB"[scene % 2]))
        rows.append({n: seconds(prepare(host, [example], of)) for n, of in arms.items()})
    lines = [
        f"{args.rounds} interleaved rounds of {args.steps} steps with their first masks, a scene each; batch "
        f"{em.batch}, one thread, CPU time.",
        "",
    ]
    lines += [
        "| run | median s | ratio to plain: min | median | mean | max |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in arms:
        ratios = sorted(row[name] / row["plain"] for row in rows)
        middle = statistics.median(row[name] for row in rows)
        lines.append(
            f"| {name} | {middle:.2f} | {ratios[0]:.3f} | {statistics.median(ratios):.3f} "
            f"| {statistics.mean(ratios):.3f} | {ratios[-1]:.3f} |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / "em_cost.md").write_text("# The price of EM\n\n" + text)
    (RESULTS / "em_cost.json").write_text(json.dumps(rows) + "\n")
    print(text)


if __name__ == "__main__":
    main()
