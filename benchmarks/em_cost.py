"""The price of EM: time of an EM run, its first masks included, over a plain token run of as many steps.

    python benchmarks/em_cost.py --rounds 5

Runs are interleaved and compared as ratios within a round, so a machine whose speed drifts does no
harm. "Plain" is mode `none`: the diffusion loss on the tokens, no masks and no attention recorded. A run
of `--of` steps is its first masks, with the regions of self-attention, and as many times the loop's step.
CPU time is compared.
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


def seconds(problem: Problem, of: int) -> float:
    """Time of a run of `of` steps, from that of its start and of its loop; loading is not counted."""
    started = time.process_time()
    state = initialise(problem)
    first = time.process_time() - started
    run(problem, state)
    loop = time.process_time() - started - first
    return first + loop * of / problem.settings.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--of", type=int, default=400, help="steps of the run that is reckoned")
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
    example = example_of(concept_scene(0, "B"))
    problems = {name: prepare(host, [example], settings) for name, settings in arms.items()}
    rows = [
        {name: seconds(problem, args.of) for name, problem in problems.items()}
        for _ in range(args.rounds)
    ]
    lines = [
        f"{args.rounds} interleaved rounds of {args.steps} steps, reckoned for {args.of} with the first "
        f"masks; batch {em.batch}, one thread, CPU time.",
        "",
    ]
    lines += [
        "| run | median s | ratio to plain: min | median | max |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in arms:
        ratios = sorted(row[name] / row["plain"] for row in rows)
        middle = statistics.median(row[name] for row in rows)
        lines.append(
            f"| {name} | {middle:.2f} | {ratios[0]:.3f} | {statistics.median(ratios):.3f} | {ratios[-1]:.3f} |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / "em_cost.md").write_text("# The price of the E-step\n\n" + text)
    (RESULTS / "em_cost.json").write_text(json.dumps(rows) + "\n")
    print(text)


if __name__ == "__main__":
    main()
