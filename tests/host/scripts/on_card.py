"""Steps at full size on a real graphics card: `on_card.py FOLDER FAMILY-SIDE-KIND-PLAN ...`.

One line of JSON for each case, such as `sdxl-1024-lora-half`; kind "visual" is a visual condition. A checkpoint
of random weights is written into the folder for each family and loaded as ComfyUI loads it. While the steps run,
no more of the card is free than the plan says it needs.
"""

import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

folder, cases = Path(sys.argv[1]), sys.argv[2:]

import full_size  # noqa: E402
import write_checkpoint  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

STEPS = 6


def run_case(loaded: Sequence[Any], case: str) -> dict[str, Any]:
    """Steps of one kind and plan, with all that LearnConcepts has around them."""
    family, width, kind, short = case.split("-")
    side, plan_name = int(width), full_size.PLANS[short]
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
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """The cases in turn, a family's after one another."""
    for family in dict.fromkeys(case.partition("-")[0] for case in cases):
        file = folder / f"random_{family}.safetensors"
        write_checkpoint.write(family, file, torch.Generator("cuda").manual_seed(0))
        loaded = comfy.sd.load_checkpoint_guess_config(str(file))[:3]
        for case in (case for case in cases if case.startswith(f"{family}-")):
            row = run_case(loaded, case) | {"card": torch.cuda.get_device_name()}
            sys.stdout.write(json.dumps(row | {"torch": torch.__version__}) + "\n")
            sys.stdout.flush()
        del loaded
        file.unlink()


logging.disable(logging.WARNING)
main()
