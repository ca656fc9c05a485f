"""Count the bytes of real steps at full size, on ComfyUI's own classes, and what the model of memory says.

`counted.py FAMILY-SIDE-KIND-PLAN ...`: one line of JSON for each, such as `sdxl-1024-lora-half`. Kind
"visual" is a visual condition, of which tokens and blocks learn.
"""

import itertools
import json
import logging
import sys
from dataclasses import asdict, replace
from typing import Any

cases = sys.argv[1:]

import full_size  # noqa: E402
from counting import Bytes  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import torch  # noqa: E402
from full_size import META  # noqa: E402

MODELS: dict[str, Any] = {}
PROMPT = "a photo of <rex:dog> and <doll:doll> on grass"


def models_of(family: str) -> Any:
    """The family's models, made once."""
    if family not in MODELS:
        with torch.inference_mode(False):
            MODELS[family] = part("nodes.host.families").identify(
                full_size.unet(family), full_size.clip(family), full_size.Autoencoder()
            )
    return MODELS[family]


def blank(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=META)


def count(family: str, side: int, kind: str, plan_name: str, batch: int = 1) -> dict[str, Any]:
    """Peak of a step and of an E-step's passes, and how often a step waits for the device."""
    plans, host_module = part("em_core.model.plans"), part("nodes.host.comfy_host")
    settings, joint_module = part("em_core.settings"), part("em_core.method.joint")
    models, device = models_of(family), plans.Device(torch.bfloat16, True)
    plan = next(plan for plan in plans.PLANS if plan.name == full_size.PLANS[plan_name])
    # The largest step of a visual condition is one with all concepts, each of which has blocks.
    em = settings.EMSettings(batch=batch, image_side=side, union_sampling=kind != "visual")
    joint = settings.JointSettings(kind="none" if kind == "visual" else kind)
    visual = None
    if kind == "visual":
        visual = replace(part("em_core.presets").visual_settings(family), batch=batch, steps=2)
    body = part("nodes.host.anatomy").anatomy(models)
    prompt = part("em_core.prompts").ConceptPrompt.parse(PROMPT)
    example = part("em_core.examples").Example(torch.zeros(3, 64, 64), prompt)
    jobs = part("em_core.model.jobs")
    job = jobs.job_of(jobs.Work((example,), em, joint, visual), body, models.image_side)
    assert (job.height, job.width) == (side // 8, side // 8), job
    attempt = plans.attempt(plan, device, lambda dtype: body, job)
    clip_dtype = torch.float32 if kind == "full" else None
    with (
        host_module.learning_host(models, attempt.dtype, clip_dtype, attempt.storage) as host,
        part("nodes.host.checkpointing").checkpointing(host.unet, plan.recompute),
    ):
        host.loaded = True  # there is nothing to load
        problem, state = problem_of(host, example, em, joint, side)
        problem = replace(problem, visual=visual)
        with Bytes() as bytes_:
            bytes_.add_module(host.unet)
            bytes_.add_module(host.clip.cond_stage_model)
            weights, done = bytes_.live, 0
            if kind in ("none", "visual"):
                m_step = part("em_core.method.m_step").m_step
                for first in (True, False):  # the first step is looked at more closely
                    bytes_.reads = 0
                    state = m_step(problem, state, first)[0]
            if visual is not None:
                for event, _ in part("em_core.method.visual").learn_visual(problem, state):
                    done += event.step > 0
            elif (
                kind != "none"
            ):  # the second step has the optimizer's moments; those of a LoRA are small
                steps = 1 if kind == "lora" else 2
                for _ in itertools.islice(joint_module.learn_joint(problem, state), steps):
                    done += 1
        passes = passes_peak(host, problem, state, attempt.need.passes)
    return {
        "family": family, "side": side, "kind": kind, "plan": plan.name, "batch": batch,
        "weights": weights, "peak": bytes_.peak, "reads": bytes_.reads // max(1, done),
        "passes": passes, "at_once": attempt.need.passes, "encoded": encoding_peak(models, side),
        "estimate": attempt.need.peak, "need": attempt.need.device, "parts": asdict(attempt.need),
    }  # fmt: skip


def problem_of(host: Any, example: Any, em: Any, joint: Any, side: int) -> tuple[Any, Any]:
    """A problem of one picture without values, and a state of it."""
    module, states = part("em_core.method.problem"), part("em_core.method.state")
    n, z = len(example.prompt.names), side // 8
    layers = host.attention_layers((z, z))
    among = part("em_core.model.layers").region_layers(host.self_attention_layers((z, z)))
    prepared = module.Prepared(example, (side, side), blank(1, 4, z, z), None, layers, among, None)
    problem = module.Problem(host, (prepared,), example.prompt.concepts, em, joint)
    finest = part("em_core.model.layers").finest_size(layers)
    picture = states.PictureState(
        blank(n, *finest), blank(n, *finest), blank(n), blank(n, side, side),
        blank(n, side, side) > 0.5, torch.ones(n, dtype=torch.bool),
    )  # fmt: skip
    vectors = {
        name: {encoder: blank(1, width) for encoder, width in host.models.encoders.items()}
        for name in example.prompt.names
    }
    generator = torch.Generator().get_state()
    return problem, states.RunState(vectors, generator, (picture,))


def passes_peak(host: Any, problem: Any, state: Any, together: int) -> int:
    """Peak of the passes of an E-step, without the weights, so many at once."""
    host.passes_at_once = together
    prepared = problem.pictures[0]
    maps = part("em_core.method.maps")
    with Bytes() as bytes_, torch.no_grad():
        bytes_.add_module(host.unet)
        bytes_.add_module(host.clip.cond_stage_model)
        weights = bytes_.live
        generator = torch.Generator().manual_seed(0)
        maps.read_attention(
            host, prepared, state.vectors, problem.settings.masks, together, generator, regions=True
        )
    return bytes_.peak - weights


def encoding_peak(models: Any, side: int) -> int:
    """Peak of encoding a picture, with the VAE's weights."""
    vae = models.vae.first_stage_model
    with Bytes() as bytes_, torch.no_grad():
        bytes_.add_module(vae)
        vae.encode(blank(1, 3, side, side))
    return bytes_.peak


logging.disable(logging.WARNING)
full_size.use_fused_attention()
# References are encoded when nothing else is on the device, and what that takes is counted apart.
part("em_core.method.references").encode = lambda host, picture: blank(
    1, 4, picture.shape[-2] // 8, picture.shape[-1] // 8
)
with torch.inference_mode():
    for case in cases:
        family, side, kind, plan_name, *more = case.split("-")
        batch = int(more[0]) if more else 1
        sys.stdout.write(json.dumps(count(family, int(side), kind, plan_name, batch)) + "\n")
        sys.stdout.flush()
