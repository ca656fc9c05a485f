"""A visual condition inside ComfyUI: `visual.py CASE.safetensors MODEL_FOLDER OUT.safetensors`.

Learns as the case says, and samples with the case's condition in one step, whose result is the guided
prediction itself; the other host's values are compared outside. Then whole samplings are compared with one
another: without the condition, with halves of guidance apart, again from the cache, and in company.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from inside import import_pack, part, start_comfyui

case, folder, out = map(Path, sys.argv[1:4])
start_comfyui()
import_pack()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402

logging.disable(logging.WARNING)
applied, settings = part("nodes.host.visual"), part("em_core.settings")
conditions, drawing = part("em_core.runs.visual_condition"), part("em_core.model.visual_drawing")
with safe_open(case, framework="pt") as file:
    plain = json.loads(file.metadata()["plain"])
    picture, noise = file.get_tensor("picture"), file.get_tensor("noise")
condition = conditions.VisualCondition.load(Path(plain["condition"]))


def learn() -> dict[str, torch.Tensor]:
    """Losses and blocks of a run on this host."""
    em = settings.from_json(settings.EMSettings, plain["em"])
    visual = settings.from_json(settings.VisualSettings, plain["visual"])
    prompt = part("em_core.prompts").ConceptPrompt.parse(plain["prompt"])
    example = part("em_core.examples").Example(picture, prompt)
    models = part("nodes.host.families").identify(*load())
    with part("nodes.host.comfy_host").learning_host(models, torch.float32) as host:
        found = part("em_core.runs.visual").learn_visual(host, [example], em, visual)
    curves = {
        name: torch.tensor([value for _, value in points])
        for name, points in found.concepts.curves.items()
        if "loss/" in name
    }
    return curves | {f"blocks/{name}": x for name, x in found.blocks.items()}


def load() -> Any:
    return part("nodes.host.demo_model").load_demo_model(folder)


def sample(
    model: Any, clip: Any, steps: int = 3, text: str = plain["text"], cfg: float = 3.0
) -> torch.Tensor:
    positive, negative = (nodes.CLIPTextEncode().encode(clip, t)[0] for t in (text, ""))
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive, negative, torch.zeros_like(noise),
        disable_pbar=True, seed=0,
    )  # fmt: skip


def other(**changes: Any) -> Any:
    """The condition learned in ViCo's way."""
    from dataclasses import replace

    kept = {"gated": False, "own_prompts": True} | changes
    return replace(condition, settings=replace(condition.settings, **kept))


def apply(model: Any, clip: Any, made: Any = None, **changes: Any) -> Any:
    made = made or condition
    return applied.apply_visual(model, clip, made, made.use(**({"strength": 0.7} | changes)))[:2]


def hooks_in(model: Any) -> int:
    modules = model.model.diffusion_model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def draw() -> dict[str, torch.Tensor]:
    """Guided predictions, and what has to be equal on this host alone."""
    model, clip, _ = load()
    found = {
        "ours": sample(*apply(model, clip), steps=1),
        "vico": sample(*apply(model, clip, other()), steps=1),
    }
    base = sample(*apply(model, clip, strength=0.0))
    zeros = {n: torch.zeros_like(x) if "to_out" in n or "ff.out" in n else x
             for n, x in condition.blocks.items()}  # fmt: skip
    from dataclasses import replace

    assert torch.equal(sample(*apply(model, clip, replace(condition, blocks=zeros))), base)
    assert torch.equal(sample(*apply(model, clip), text="a photo of a circle on sand"),
                       sample(*apply(model, clip, strength=0.0), text="a photo of a circle on sand"))  # fmt: skip
    known = set(applied.MEMORIES)
    seeing = apply(model, clip)
    whole = sample(*seeing)
    assert (whole - base).abs().max() > 1e-2
    (sight,) = set(applied.MEMORIES) - known
    assert len(sight.memory.cache.held) == 3
    looked: list[int] = []
    before = drawing.Viewer.look
    drawing.Viewer.look = lambda *args: looked.append(1) or before(*args)
    assert torch.equal(sample(*seeing), whole) and not looked
    concat = comfy.samplers.can_concat_cond
    comfy.samplers.can_concat_cond = lambda a, b: a is b
    for made in (condition, other()):
        looked.clear()
        apart = sample(*apply(model, clip, made))
        assert len(looked) == (3 if made is condition else 6)
        comfy.samplers.can_concat_cond = concat
        torch.testing.assert_close(apart, sample(*apply(model, clip, made)), atol=1e-3, rtol=1e-3)
        comfy.samplers.can_concat_cond = lambda a, b: a is b
    comfy.samplers.can_concat_cond, drawing.Viewer.look = concat, before
    late = sample(*apply(model, clip, span=(0.9, 1.0)))
    assert 0 < (late - base).abs().mean() < (whole - base).abs().mean()
    assert not hooks_in(model) and not sight.memory.prompts and not sight.memory.viewers
    company(model, clip, base, whole)
    return found


def company(model: Any, clip: Any, base: torch.Tensor, whole: torch.Tensor) -> None:
    """With tokens and masks of Apply Concept Tokens, other patches, a LoRA, and a second condition."""
    concepts = condition.concepts
    masks = {name: torch.ones(64, 64) for name in concepts.names}
    placed = part("nodes.host.application").apply_concepts(model, clip, concepts, 1.0, masks)
    plain_layout = sample(*placed)
    torch.testing.assert_close(plain_layout, base, atol=1e-4, rtol=1e-4)  # masks of everything
    torch.testing.assert_close(sample(*apply(*placed)), whole, atol=1e-3, rtol=1e-3)
    left = {name: torch.zeros(64, 64) for name in concepts.names}
    placed = part("nodes.host.application").apply_concepts(model, clip, concepts, 1.0, left)
    assert (sample(*apply(*placed)) - whole).abs().max() > 1e-3
    seeing, knowing = apply(model, clip)
    patched = seeing.clone()
    patched.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    patched.set_model_attn2_output_patch(lambda n, options: n)
    assert torch.equal(sample(patched, knowing), whole)
    patched.set_model_attn2_output_patch(lambda n, options: n * 0.9)
    assert (sample(patched, knowing) - whole).abs().max() > 1e-3
    shifted = seeing.clone()
    name = "diffusion_model.output_blocks.1.1.transformer_blocks.0.ff.net.2.weight"
    shifted.add_patches({name: ("diff", (torch.full((128, 512), 0.01),))})
    fresh = model.clone()
    fresh.add_patches({name: ("diff", (torch.full((128, 512), 0.01),))})
    again = sample(*apply(fresh, clip))
    torch.testing.assert_close(sample(shifted, knowing), again)  # nothing of the cache is stale
    assert (again - whole).abs().max() > 1e-3
    twice = sample(*apply(seeing, knowing))
    assert (twice - whole).abs().max() > 1e-3 and torch.isfinite(twice).all()


with torch.inference_mode():
    result = draw()
    result |= learn()
save_file({name: x.contiguous() for name, x in result.items()}, out)
sys.stdout.write("all is fine\n")
