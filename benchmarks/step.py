"""The price of a step: ours against a plain token step, against Break-a-Scene's, and with three concepts.

    python benchmarks/step.py --rounds 5              time at 256 px, memory at 256 and 512 px
    python benchmarks/step.py --rounds 1 --side 512   time at 512 px, for which 16 GB have to be free
    python benchmarks/step.py --rounds 20 --side 512 --device cuda --dtype bfloat16   on a graphics card

Stable Diffusion 1.5's topology at full width with random weights, batch 1. The steps are interleaved within a
round and compared as ratios there, so that a machine whose speed drifts does little harm; on a CPU their time
is CPU time. In bfloat16, as a run has its frozen weights on a card, Break-a-Scene's step is left out. Memory
is the peak of all tensors in a step, counted on the meta device with attention that keeps what a fused kernel
does.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from break_a_scene import BreakAScene
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from timing import place_of, seconds
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from em_core import Example
from em_core.demo import model_path
from em_core.hosts.diffusers import DiffusersHost
from em_core.masks.estimate import make_refiner
from em_core.method.e_step import e_step, with_free_statistics
from em_core.method.m_step import m_step
from em_core.method.problem import Prepared, Problem
from em_core.method.start import whole_picture
from em_core.method.state import RunState
from em_core.presets import em_settings
from em_core.prompts import ConceptPrompt
from em_core.settings import JointSettings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "host" / "scripts"))
from counting import Bytes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30
PROMPTS = {
    1: "a photo of <rex:dog>",
    2: "a photo of <rex:dog> and <doll:doll>",
    3: "a photo of <rex:dog> and <doll:doll> and <shore:beach>",
}


def pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with random weights, but for a small autoencoder: no step runs it."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=49408, eos_token_id=49407, bos_token_id=49406,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32,) * 4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(model_path() / "tokenizer"),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@dataclass
class Arm:
    """One kind of step, with its run's problem and state, which goes on from step to step."""

    problem: Problem
    state: RunState

    def step(self) -> None:
        """Take one M-step; where masks are estimated, its pass's own maps are added up."""
        self.state, drawn, _, maps = m_step(self.problem, self.state)
        if self.problem.settings.mode == "em":
            self.state = with_free_statistics(self.problem, self.state, drawn, maps)

    def e_step(self) -> None:
        """Estimate the masks again, which on random weights are not worth going on with."""
        e_step(self.problem, self.state)


def arm(host: DiffusersHost, side: int, concepts: int, mode: Any) -> Arm:
    """A run on a picture of noise, under masks that lie side by side."""
    device, em = host.device, replace(em_settings("sd1"), mode=mode)
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(3, side, side, generator=generator)
    example = Example(picture, ConceptPrompt.parse(PROMPTS[concepts]))
    size, latent = (side, side), (side // host.factor, side // host.factor)
    prepared = Prepared(
        example, size, torch.randn(1, 4, *latent, generator=generator).to(device), None,
        host.attention_layers(latent), (),
        None if device.type == "meta" else make_refiner(picture.to(device), em.masks),
    )  # fmt: skip
    concept_names = example.prompt.names
    problem = Problem(host, (prepared,), example.prompt.concepts, em, JointSettings())
    masks = torch.zeros(concepts, side, side)
    for index in range(concepts):
        masks[index, :, index * side // concepts : (index + 1) * side // concepts] = 1
    masks = masks.to(device)
    started = replace(whole_picture(prepared), masks=masks, labels=masks > 0.5)
    vectors = {
        name: {
            e.name: 0.01 * torch.randn(1, e.width, generator=generator).to(device)
            for e in host.encoders
        }
        for name in concept_names
    }
    return Arm(problem, RunState(vectors, generator.get_state(), (started,)))


def arms(host: DiffusersHost, side: int) -> dict[str, Arm]:
    return {
        "plain token step": arm(host, side, 2, "none"),
        "ours": arm(host, side, 2, "em"),
        "ours, one concept": arm(host, side, 1, "em"),
        "ours, three concepts": arm(host, side, 3, "em"),
    }


def measure(
    side: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, float]]:
    """Time of each kind of step, round by round, and of an E-step."""
    host = DiffusersHost(pipeline(), device, dtype=dtype)
    kinds = arms(host, side)
    other = BreakAScene(host, kinds["ours"].problem, kinds["ours"].state.pictures[0].masks)
    generator, rows = torch.Generator().manual_seed(3), []
    for number in range(rounds + 1):
        row = {name: seconds(kind.step, device) for name, kind in kinds.items()}
        row["E-step"] = seconds(kinds["ours"].e_step, device)
        if dtype == torch.float32:
            with other.installed():
                row["Break-a-Scene"] = seconds(lambda: other.step(generator), device)
        if number:  # the first round makes what later ones reuse
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
    """Attention by an operator that saves what every fused kernel does."""
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    causal = bool(more.get("is_causal"))
    return call(q, k, v, 0.0, causal, attn_mask=attn_mask)[0]


def memory() -> dict[str, dict[str, float]]:
    """Bytes of the steps at both sizes, all in float32, and with our frozen weights in bfloat16, as a run
    has them on a card."""
    found = {}
    for side in (256, 512):
        found[f"{side} px, float32"] = wide = count(side, torch.float32)
        theirs = {name: wide[name] for name in ("Break-a-Scene", "Break-a-Scene's weights")}
        found[f"{side} px, ours in bfloat16"] = count(side, torch.bfloat16) | theirs
    return found


def count(side: int, dtype: torch.dtype) -> dict[str, float]:
    """Peak bytes of each kind of step, and those of the models' weights."""
    with torch.device("meta"):
        host = DiffusersHost(pipeline(), "meta", dtype=dtype)
    kinds = arms(host, side)
    other = BreakAScene(host, kinds["ours"].problem, kinds["ours"].state.pictures[0].masks)
    generator, weights = torch.Generator().manual_seed(3), peak(host, lambda: None)
    found = {"weights": weights}
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", fused):
        found |= {name: peak(host, kind.step) for name, kind in kinds.items()}
    if dtype == torch.float32:
        found["Break-a-Scene's weights"] = weights
        with other.installed():
            found["Break-a-Scene"] = peak(host, lambda: other.step(generator), other.before)
    return found


def peak(host: DiffusersHost, step: Callable[[], Any], *more: Tensor) -> float:
    """The most bytes that live at a time in the second of two steps, when the moments are there."""
    with Bytes() as bytes_:
        for module in (host.unet, *(encoder.model for encoder in host.encoders)):
            bytes_.add_module(module)
        for tensor in more:
            bytes_.add(tensor)
        step()
        step()
    return float(bytes_.peak)


PAIRS = (
    ("ours", "plain token step"),
    ("ours, three concepts", "ours, one concept"),
    ("ours", "Break-a-Scene"),
    ("ours with its E-steps", "plain token step"),
    ("ours with its E-steps", "Break-a-Scene"),
)
HEAD = """# The price of a step

Stable Diffusion 1.5's topology at full width with random weights, batch 1, a prompt of two concepts unless
it says otherwise. *Plain* is the diffusion loss on the tokens alone. *Break-a-Scene* is its step as
`break_a_scene.py` rebuilds it, without its encoding of the pictures, and on our frozen layers, which keep
less than its own. An E-step with its {refresh} passes comes every {every} steps, of which each has its share.
Ratios are taken within a round.
"""


def with_shares(row: dict[str, float]) -> dict[str, float]:
    """Times of a round, with that of a step and its share of the E-step."""
    every = em_settings("sd1").e_step_every
    return row | {"ours with its E-steps": row["ours"] + row["E-step"] / every}


def time_table(where: str, rounds: list[dict[str, float]]) -> list[str]:
    rows = [with_shares(row) for row in rounds]
    lines = [
        f"\n## Time at {where}\n",
        f"{len(rows)} interleaved rounds.\n",
        "| step | median s | least | most |",
        "| --- | --- | --- | --- |",
    ]
    for name in rows[0]:
        values = [row[name] for row in rows]
        lines.append(
            f"| {name} | {statistics.median(values):#.3g} | {min(values):#.3g} | {max(values):#.3g} |"
        )
    lines += ["", "| ratio | median | least | most |", "| --- | --- | --- | --- |"]
    for name, to in PAIRS:
        if to not in rows[0]:
            continue
        values = [row[name] / row[to] for row in rows]
        lines.append(
            f"| {name} / {to} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |"
        )
    return lines


def memory_table(counts: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "\n## Memory\n",
        "Peak of all tensors in a step, GiB, counted on the meta device; ours with attention that keeps\n"
        "what a fused kernel does. *Beyond weights* leaves out those of the models. Shares are of\n"
        "Break-a-Scene's, which is in float32.\n",
        "| size | step | peak | beyond weights | share of the peak | share beyond weights |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size, count in counts.items():
        for name, value in count.items():
            theirs = name == "Break-a-Scene"
            if name.endswith("weights") or (theirs and "bfloat16" in size):
                continue
            others, of_weights = count["Break-a-Scene"], count["Break-a-Scene's weights"]
            own, of_others = value - count["weights"], others - of_weights
            lines.append(
                f"| {size} | {name} | {value / GIB:.2f} | {own / GIB:.2f} | {value / others:.2f} | "
                f"{own / of_others:.2f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="0 counts memory alone")
    parser.add_argument(
        "--side", type=int, default=256, help="of the pictures whose steps are timed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--table", action="store_true", help="only write step.md from step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    file = RESULTS / "step.json"
    found = json.loads(file.read_text()) if file.is_file() else {"time": {}}
    if args.rounds and not args.table:
        device = torch.device(args.device)
        where = f"{args.side} px, {args.dtype}, {place_of(device)}"
        dtype = getattr(torch, args.dtype)
        found["time"][where] = measure(args.side, args.rounds, device, dtype)
    if not args.table and args.device == "cpu":
        found["memory"] = memory()
    file.write_text(json.dumps(found, indent=1) + "\n")
    em = em_settings("sd1")
    lines = [HEAD.format(refresh=em.refresh, every=em.e_step_every)]
    for where, rounds in found["time"].items():
        lines += time_table(where, rounds)
    lines += memory_table(found["memory"])
    (RESULTS / "step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
