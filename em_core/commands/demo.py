"""`python -m em_core demo`: the whole method once, in the demo world."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from ..demo.scenes import ConceptPicture, ConceptScene, concept_scene, write_scene
from ..examples import Example
from ..files import write_json
from ..hosts.diffusers import DiffusersHost
from ..jobs.outputs import mask_file
from ..method.loop import StepEvent
from ..method.problem import Problem, prepare
from ..method.start import initialise
from ..method.state import RunState
from ..pictures import save_image, save_mask, to_image
from ..presets import em_settings, joint_settings
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet, conclude
from ..runs.runner import run
from ..settings import Mode
from ..show.drawing import overlay, sheet
from ..show.metrics import final_iou, metrics
from ..show.plots import plot_curves
from . import options
from .common import Progress, load_host, require_folder
from .scene import files_of
from .writing import add_output_options, require_new, say

SETS_OF_SEVERAL = ("A", "B", "C", "D", "E", "F", "I", "J")  # in one picture
SEED, SET = 26, "J"
SCALE = 3
# At 5 the demo model draws learned colours too strong: grey turns blue, and pink dark red.
GUIDANCE = 3.0
FILES = (
    "masks_evolving.png",
    "generated.png",
    "curves.png",
    "concepts.safetensors",
    "metrics.json",
    "overlay_start.png",
    "overlay_end.png",
)
OTHER_PLACES = ("sand", "brick", "grass", "snow")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `demo` command."""
    parser = subparsers.add_parser(
        "demo",
        help="learn two concepts from one rendered picture and draw them together",
        description="Render a scene with two concepts that the demo model never saw, learn them and draw them.",
        epilog="example:\n  python -m em_core demo --out output/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/demo"),
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=SEED,
        help="seed of the scene and the run (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        choices=SETS_OF_SEVERAL,
        default=SET,
        help="which of the sets of `scene` (default: %(default)s, two of a kind and a bystander)",
    )
    add_output_options(parser)
    parser.set_defaults(run=run_command)


class Film:
    """A listener that keeps an overlay of the masks at the start and at every E-step."""

    def __init__(self, picture: torch.Tensor) -> None:
        self.picture = picture
        self.frames: dict[int, Image.Image] = {}

    def __call__(self, event: StepEvent, state: RunState) -> None:
        """Keep an overlay if the event has new masks."""
        if event.masks:
            self.frames[event.step] = overlay(self.picture, state.pictures[0].labels, SCALE)


def run_command(args: argparse.Namespace) -> int:
    """Write everything to --out and print a short table."""
    started, out = time.monotonic(), args.out
    scene = concept_scene(args.seed, args.set)
    names = [*FILES, *map(mask_file, scene.only.masks), *(f"scene/{f}" for f in files_of(scene))]
    require_new([out / name for name in names], args.overwrite)
    require_folder(out)
    host = load_host("demo")
    write_scene(scene, out / "scene")
    example = example_of(scene)
    film = Film(example.picture)
    fixed, _, fixed_state = learn(host, example, "fixed", args, [])
    problem, seconds, state = learn(host, example, "em", args, [film])
    concepts = conclude(problem, state)
    concepts.save(out / "concepts.safetensors")
    write_pictures(problem, state, film, out)
    save_image(out / "generated.png", generated(host, concepts, scene))
    plot_curves(state.curves, out / "curves.png")
    report = metrics(problem, state, seconds) | {"fixed": metrics(fixed, fixed_state, 0.0)["iou"]}
    write_json(out / "metrics.json", report)
    say(args, table(state, fixed_state, out, time.monotonic() - started))
    return 0


def example_of(scene: ConceptScene | ConceptPicture) -> Example:
    """Return a scene of one picture, or a picture of a scene, as an example with its true masks."""
    picture = rearrange(torch.from_numpy(scene.image.astype(np.float32) / 255), "h w c -> c h w")
    truth = {name: torch.from_numpy(mask) for name, mask in scene.masks.items()}
    return Example(picture, ConceptPrompt.parse(scene.prompt), truth=truth)


def learn(
    host: DiffusersHost,
    example: Example,
    mode: Mode,
    args: argparse.Namespace,
    listeners: Sequence[Film],
) -> tuple[Problem, float, RunState]:
    """Learn with a progress bar; return the problem, the seconds it took, and the final state."""
    started = time.monotonic()
    family = host.identity().family
    settings = replace(em_settings(family), mode=mode, seed=args.seed)
    joint = joint_settings(family, "full" if mode == "em" else "none")
    problem = prepare(host, [example], settings, joint)
    progress = Progress(args.quiet)
    state = run(problem, initialise(problem), [progress, *listeners])
    progress.close()
    return problem, time.monotonic() - started, state


def write_pictures(problem: Problem, state: RunState, film: Film, out: Path) -> None:
    """Write the final masks, overlays of the start and the end, and the strip between them."""
    first, last = min(film.frames), max(film.frames)
    save_image(out / "overlay_start.png", film.frames[first])
    save_image(out / "overlay_end.png", film.frames[last])
    titles = ["start = fixed" if step == 0 else f"step {step}" for step in film.frames]
    truth = torch.stack(list(problem.pictures[0].truth.values()))
    frames = {"masks": [*film.frames.values(), overlay(film.picture, truth, SCALE)]}
    save_image(out / "masks_evolving.png", sheet(frames, [*titles, "truth"], side=128))
    for name, mask in zip(problem.pictures[0].names, state.pictures[0].labels, strict=True):
        save_mask(out / f"mask_{name}.png", mask)


def generated(host: DiffusersHost, concepts: ConceptSet, scene: ConceptScene) -> Image.Image:
    """Draw a grid: the picture learned from, each concept alone, both together, both elsewhere."""
    one, two = concepts.names[:2]
    here = scene.background
    elsewhere = next(place for place in OTHER_PLACES if place != here)
    prompts = {
        f"<{one}> on {here}": f"a photo of <{one}> on {here}",
        f"<{two}> on {here}": f"a photo of <{two}> on {here}",
        f"both on {here}": f"a photo of <{one}> and <{two}> on {here}",
        f"both on {elsewhere}": f"a photo of <{one}> and <{two}> on {elsewhere}",
    }
    learned_from = Image.fromarray(scene.image)
    rows = {}
    for title, text in prompts.items():
        pictures = host.generate(text, concepts, range(5), guidance=GUIDANCE)
        rows[title] = [learned_from, *map(to_image, pictures)]
    return sheet(rows, ["learned from", *(f"seed {seed}" for seed in range(5))], side=128)


def table(state: RunState, fixed: RunState, out: Path, seconds: float) -> str:
    """Return the summary that the demo prints at its end."""
    start = {name: points[0][1] for name, points in state.curves.items() if name.startswith("iou/")}
    lines = [
        "",
        "mask IoU (mean over the concepts)",
        f"  at the start       {sum(start.values()) / len(start):.3f}",
        f"  with fixed masks   {final_iou(fixed.curves):.3f}",
        f"  with EM            {final_iou(state.curves):.3f}",
        f"files in {out}: {', '.join(FILES[:5])}",
        f"time: {seconds:.0f} s",
    ]
    return "\n".join(lines)
