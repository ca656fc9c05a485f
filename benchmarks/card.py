"""What learning takes of a real graphics card at full size: memory against the estimate, and seconds.

    python benchmarks/card.py --comfyui ~/comfy/ComfyUI --folder /tmp/checkpoints      # in ComfyUI's Python

A checkpoint of random weights is written for each family and loaded as ComfyUI loads it; then some steps of
each kind and plan run as LearnConcepts and LearnVisualCondition run them. *Allocated* is the peak of PyTorch's
tensors, *reserved* what it holds of the card for them. While they run, only as much of the card is free as the
plan says it needs, so that a plan that needs more fails here. Rows are appended to results/card.jsonl and never repeated on the same card; without --comfyui, only results/card.md is
written from them.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS, TABLE = (ROOT / "benchmarks" / "results" / f"card.{end}" for end in ("jsonl", "md"))
GIB = 2**30
STEPS = 6
FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
PLANS = ("half", "half, recomputing", "fp8, recomputing")
WHOLE = ("float32", "float32, recomputing")
SIZES = (("sd1", 512), ("sd2", 768), ("sdxl", 1024))
Case = tuple[str, int, str, str]
GRID: list[Case] = [
    *(
        (f, s, kind, plan)
        for f, s in SIZES
        for kind in ("none", "lora", "visual")
        for plan in PLANS
    ),
    *((f, s, "cross_attention", plan) for f, s in SIZES for plan in WHOLE),
    *(("sd1", 512, "full", plan) for plan in WHOLE),
]
HEAD = """# What learning takes of a real card

{card}, torch {torch}, ComfyUI's own classes with random weights in fp16, batch 1, two concepts. Seconds are
medians of {steps} steps; an E-step comes every 20 steps. GiB: *estimated* is what the plans go by, *allocated*
the peak of tensors, *reserved* what PyTorch held of the card, *free* what has to be free for the plan to be
chosen. No more than that was free: *fits* says whether it ran.

| family | pixels | learns | plan | s a step | s an E-step | estimated | allocated | reserved | free | fits |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def measure(comfyui: Path, folder: Path, rows: Path) -> None:
    """Run what is missing of the grid in this process, which then is ComfyUI's."""
    os.environ["COMFYUI_PATH"], os.environ["VISUAL_CONCEPTS_DEVICE"] = str(comfyui), "cuda"
    sys.path.insert(0, str(ROOT / "tests" / "host" / "scripts"))
    import full_size
    from inside import import_pack

    import_pack()
    import comfy.sd
    import torch

    done = {tuple(row[k] for k in ("family", "side", "kind", "plan")) for row in read_rows(rows)}
    for family, side in SIZES:
        todo = [case for case in GRID if case[:2] == (family, side) and case not in done]
        if not todo:
            continue
        file = folder / f"random_{family}.safetensors"
        if not file.exists():
            write_checkpoint(full_size, family, file)
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(file))[:3]
        for case in todo:
            row = {**run_case((model, clip, vae), case), "card": torch.cuda.get_device_name()}
            with rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row | {"torch": torch.__version__}) + "\n")
            sys.stderr.write(f"{json.dumps(row)}\n")
        del model, clip, vae
        file.unlink()


def write_checkpoint(full_size: Any, family: str, file: Path) -> None:
    """Random weights that neither grow nor vanish from layer to layer, made on the card."""
    import torch
    from safetensors.torch import save_file

    sys.argv = [sys.argv[0], family, str(file)]
    import write_checkpoint as writing

    writing.family, writing.small = family, []
    tensors = {}
    for name, like in writing.shapes().items():
        if "position_ids" in name:
            tensors[name] = torch.arange(like.numel()).reshape(like.shape)
            continue
        x = torch.randn(like.shape, device="cuda", dtype=torch.float16)
        scale = like.ndim == 0 or ("norm" in name and name.endswith("weight"))
        x = x / like[0].numel() ** 0.5 if like.ndim > 1 else 1.0 * scale + 0.02 * x
        tensors[name] = x.half().cpu()
    save_file(tensors, file)


def run_case(loaded: Sequence[Any], case: Case) -> dict[str, Any]:
    """Steps of one kind and plan, with all that LearnConcepts has around them."""
    import comfy.model_management as mm
    import torch
    from inside import part

    family, side, kind, plan_name = case
    plans, presets = part("em_core.model.plans"), part("em_core.presets")
    models = part("nodes.host.families").identify(*loaded)
    device = part("nodes.learning.memory").device_of(models.model)
    plan = next(plan for plan in plans.PLANS if plan.name == plan_name)
    example = example_of(side)
    em = replace(presets.em_settings(family), batch=1, image_side=side, mode="given")
    joint = presets.joint_settings(family, "none" if kind == "visual" else kind)
    visual = replace(presets.visual_settings(family), batch=1) if kind == "visual" else None
    body, jobs = part("nodes.host.anatomy").anatomy(models), part("em_core.model.jobs")
    job = jobs.job_of(jobs.Work((example,), em, joint, visual), body, models.image_side)
    attempt = plans.attempt(plan, device, lambda dtype: body, job)
    clip_dtype = torch.float32 if kind == "full" else None
    mm.unload_all_models()
    mm.soft_empty_cache()
    torch.cuda.synchronize()
    spare = max(0, torch.cuda.mem_get_info()[0] - int(attempt.need.device))
    ballast = torch.empty(spare, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    e_times: list[float] = []
    try:
        with (
            part("nodes.host.comfy_host").learning_host(
                models, attempt.dtype, clip_dtype, attempt.storage
            ) as host,
            part("nodes.host.checkpointing").checkpointing(host.unet, plan.recompute),
        ):
            host.loss_scale, host.passes_at_once = attempt.loss_scale, attempt.need.passes
            host.memory_required = attempt.need.trained + attempt.need.step
            problem = part("em_core.method.problem").prepare(host, [example], em, joint, visual)
            state = part("em_core.method.start").initialise(problem)
            step, e_step = steps_of(problem, state, kind)
            times = [timed(step) for _ in range(STEPS + 2)][2:]
            e_times = [timed(e_step) for _ in range(3)][1:] if e_step else []
    except torch.OutOfMemoryError as error:
        sys.stderr.write(f"{case}: {error}\n")
    held = ballast.numel()
    return {
        "family": family, "side": side, "kind": kind, "plan": plan_name, "batch": attempt.batch,
        "fits": bool(times), "step_s": median(times), "e_step_s": median(e_times),
        "estimate": attempt.need.peak, "need": attempt.need.device,
        "allocated": torch.cuda.max_memory_allocated() - held,
        "reserved": torch.cuda.max_memory_reserved() - held,
    }  # fmt: skip


def median(times: Sequence[float]) -> float | None:
    """Seconds, or None where nothing was timed."""
    return round(statistics.median(times), 4) if times else None


def example_of(side: int) -> Any:
    """A picture of noise with two concepts side by side."""
    import torch
    from inside import part

    prompt = part("em_core.prompts").ConceptPrompt.parse("a photo of <rex:dog> and <doll:doll>")
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    masks = {}
    for index, name in enumerate(prompt.names):
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[side // 4 : 3 * side // 4, (index * side) // 2 : (index * side) // 2 + side // 3] = (
            True
        )
        masks[name] = mask
    return part("em_core.examples").Example(picture, prompt, masks=masks)


def steps_of(
    problem: Any, state: Any, kind: str
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """A step of this kind, and an E-step where the kind has them."""
    from inside import part

    if kind == "none":
        held = [state]
        m_step, e_step = part("em_core.method.m_step").m_step, part("em_core.method.e_step")
        refining = replace(problem, settings=replace(problem.settings, mode="em"))

        def step() -> None:
            after, drawn, _, maps = m_step(refining, held[0])
            held[0] = e_step.with_free_statistics(refining, after, drawn, maps)

        return step, lambda: e_step.e_step(refining, held[0])
    learn = (
        part("em_core.method.visual").learn_visual
        if kind == "visual"
        else part("em_core.method.joint").learn_joint
    )
    left: Iterator[Any] = learn(problem, state)
    return lambda: next(left), None


def timed(action: Callable[[], Any]) -> float:
    """Seconds until the card has done it."""
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write results/card.md."""
    first = rows[0]
    text = HEAD.format(card=first["card"], torch=first["torch"], steps=STEPS)
    kinds = {"none": "tokens", "lora": "LoRA", "visual": "visual condition"} | {
        "cross_attention": "cross-attention", "full": "all weights",
    }  # fmt: skip
    for row in rows:
        sizes = (row[name] / GIB for name in ("estimate", "allocated", "reserved", "need"))
        times = ("" if row[n] is None else f"{row[n]:.3f}" for n in ("step_s", "e_step_s"))
        cells = [
            FAMILIES[row["family"]], str(row["side"]), kinds[row["kind"]], row["plan"],
            *times, *(f"{size:.1f}" for size in sizes), "yes" if row["fits"] else "no",
        ]  # fmt: skip
        text += f"| {' | '.join(cells)} |\n"
    off = max((row["allocated"] / row["estimate"] - 1 for row in rows), key=abs)
    fit = sum(row["fits"] for row in rows)
    text += (
        f"\n{fit} of {len(rows)} cases ran in what the plan wants free. The peak of tensors is off the "
        f"estimate by {off:+.1%} at most.\n"
    )
    TABLE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder; without it, only the table")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "output", help="for a checkpoint, 7 GB"
    )
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    if args.comfyui is not None:
        measure(args.comfyui, args.folder, args.rows)
    write_table(read_rows(args.rows))


if __name__ == "__main__":
    main()
