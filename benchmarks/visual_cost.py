"""What a visual condition costs at Stable Diffusion 1.5's full width: time per step, as ratios to the model.

    python benchmarks/visual_cost.py --rounds 3
    python benchmarks/visual_cost.py --rounds 20 --device cuda --side 512

The UNet has SD 1.5's shapes and random weights, at 256 px, with a text encoder of one layer; everything is in
float32 on the CPU, with one thread, and in bfloat16 on a card. All ways are timed in turn, round by round, and
the ratio of each round is taken, since other work on the machine slows all of a round alike. Writes
results/visual_cost.json, by size and place.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from timing import place_of, seconds
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from em_core.demo import model_path
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.method.m_step import draw
from em_core.method.m_step import forward_backward as plain_step
from em_core.method.optimizer import learnable
from em_core.method.problem import Problem, prepare
from em_core.method.references import References
from em_core.method.start import initialise
from em_core.method.state import generator_at
from em_core.method.visual import choose, forward_backward, places_of
from em_core.model.visual import blocks_of, init_blocks
from em_core.model.visual_drawing import Reference, Viewer, VisualUse
from em_core.presets import vico
from em_core.prompts import ConceptPrompt
from em_core.settings import EMSettings, VisualSettings

OUT = Path(__file__).parent / "results" / "visual_cost.json"
PROMPT = ConceptPrompt.parse("a photo of <rex:circle>")


def host_of(side: int, device: str) -> DiffusersHost:
    """SD 1.5's UNet with small other parts; the VAE gives latents of an eighth."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12, vocab_size=49408,
        bos_token_id=49406, eos_token_id=49407, hidden_act="quick_gelu",
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4, latent_channels=4, sample_size=side, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(model_path() / "tokenizer"),
        unet=UNet2DConditionModel(
            sample_size=side // 8, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return DiffusersHost(
        pipeline, device, dtype=torch.float32 if device == "cpu" else torch.bfloat16
    )


def mask_of(side: int) -> Tensor:
    """A concept that takes a third of a picture."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    return mask


def learning_ways(host: DiffusersHost, side: int) -> dict[str, Callable[[], Any]]:
    """One step, forward and backward, of each way of learning."""
    picture = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    example = Example(picture, PROMPT, masks={"rex": mask_of(side)})
    em = EMSettings(mode="given", image_side=side)
    ways: dict[str, Callable[[], Any]] = {}
    ours = VisualSettings()
    tokens = replace(ours, token_learning_rate=1e-3)
    as_published = vico(em, ours, batch=1)

    def plain(problem: Problem) -> Callable[[], Any]:
        state = initialise(problem)

        def step() -> None:
            learning = replace(state, vectors=learnable(state.vectors))
            plain_step(problem, learning, generator_at(state.generator))

        return step

    def visual(settings: EMSettings, visual: VisualSettings) -> Callable[[], Any]:
        problem = prepare(host, [example], settings, None, visual)
        problem = replace(problem, settings=replace(problem.settings, batch=visual.batch))
        state, places = initialise(problem), places_of(problem)
        generator = generator_at(state.generator)
        values = init_blocks(places, ["rex"], generator, visual.zero_init)
        values = {name: value.to(host.device) for name, value in values.items()}
        blocks = blocks_of({n: v.requires_grad_() for n, v in values.items()}, places)
        references = References(problem, state.pictures, [("rex",)])
        drawn = draw(problem, state, generator)
        look = choose(problem, drawn, references, blocks, generator)

        def step() -> None:
            learns = visual.token_learning_rate is not None
            vectors = learnable(state.vectors) if learns else state.vectors
            now = replace(state, vectors=vectors)
            forward_backward(problem, now, drawn, look, blocks, visual)

        return step

    ways["tokens alone"] = plain(prepare(host, [example], em))
    ways["ours"] = visual(em, ours)
    ways["ours, tokens learn too"] = visual(em, tokens)
    ways["as published"] = visual(*as_published)
    return ways


@torch.no_grad()
def drawing_ways(host: DiffusersHost, side: int) -> dict[str, Callable[[], Any]]:
    """One step of a picture under guidance: both halves in one pass."""
    words = host.initial_vectors("circle", 1, torch.Generator())
    encoded = host.encode_prompts([ConceptPrompt(()), PROMPT], {"rex": words})
    small = (side // 8, side // 8)
    Z_t = torch.randn(2, 4, *small).to(host.device)
    t = torch.full((2,), 500.0, device=host.device)
    values = init_blocks(host.image_places(small), ["rex"], torch.Generator(), zero=False)
    values = {name: value.to(host.device) for name, value in values.items()}
    latent, mask = torch.randn(4, *small).to(host.device), mask_of(side).to(host.device)
    use = VisualUse(values, (Reference(latent, {"rex": mask}),))
    viewer = Viewer(use, host.unet, host.image_places)
    stream = encoded.streams["text"]

    def look() -> Any:
        with viewer.attached():
            return viewer.look(
                lambda latent: host.predict(latent, t[:1], encoded.rows([1])),
                stream.columns[1],
                stream.length,
            )

    seen = look()

    def act(view: Any) -> None:
        viewer.chunks = (view, view)
        with viewer.attached(), torch.no_grad():
            host.predict(Z_t, t, encoded)

    def plain() -> None:
        with torch.no_grad():
            host.predict(Z_t, t, encoded)

    return {
        "the model": plain,
        "with the condition": lambda: act(look()),
        "with the condition, from the cache": lambda: act(seen),
    }


def ratios(
    ways: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Seconds of each way, and its ratio to the first: medians over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, step in ways.items():
            times[name].append(seconds(step, device))
    first = times[next(iter(ways))][1:]
    return {
        name: {
            "seconds": float(f"{statistics.median(took):.3g}"),
            "ratio": round(statistics.median(a / b for a, b in zip(took, first, strict=True)), 3),
        }
        for name, took in ((name, each[1:]) for name, each in times.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=256, help="of the pictures")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    host = host_of(args.side, args.device)
    found: dict[str, Any] = {}
    for what, ways in (("drawing", drawing_ways), ("learning", learning_ways)):
        found[what] = ratios(ways(host, args.side), args.rounds, host.device)
        print(json.dumps(found[what], indent=1), flush=True)
    every = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    every[f"{args.side} px, {place_of(host.device)}"] = found
    OUT.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
