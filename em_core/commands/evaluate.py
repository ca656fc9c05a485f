"""`python -m em_core evaluate`: draw pictures of learned concepts and measure them."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..evaluate.cases import Case
from ..evaluate.coco import CONCEPTS, PICTURES_PER_PROMPT, coco_cases
from ..evaluate.dreambench import dreambench_cases
from ..evaluate.encoders import CLIP_IMAGE, DINO, Instruments
from ..evaluate.evaluation import Evaluation
from ..evaluate.perceptual import Lpips
from ..evaluate.pretrained import Clip, Dino
from ..evaluate.references import examples_again
from ..evaluate.run import Drawing, evaluate_into
from ..evaluate.tables import table
from ..evaluate.task import read_prompts, require_prompts
from ..evaluate.writing import write_overview
from ..examples import Example
from ..hosts.diffusers import DiffusersHost
from ..hosts.loading import torch_device
from ..pictures import read_picture
from ..presets import em_settings, joint_settings
from ..runs.concept_set import ConceptSet
from ..runs.learning import learn_concepts
from ..runs.store import RunStore
from . import options
from .common import (
    Progress,
    add_any_weights,
    add_guidance,
    add_model,
    load_host,
    load_tqdm,
    quiet_libraries,
    read_masks,
    require_folder,
)
from .writing import add_quiet, say

EXAMPLE = """examples:
  python -m em_core evaluate --concepts output/learned/concepts.safetensors --image output/scene/image.png \\
      --prompts prompts.txt --clip models/clip-vit-large-patch14 --dino models/dino-vits16 --out output/evaluation
  python -m em_core evaluate --model models/sd15 --coco data/coco --clip models/clip-vit-large-patch14 \\
      --dino models/dino-vits16 --out output/coco

A stopped evaluation goes on where it was when the same command is run again."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `evaluate` command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="draw pictures of learned concepts and measure them",
        description="Draw pictures of learned concepts and measure how well they follow their prompts, whether "
        "they show the concepts, whether concepts are mixed, and how much they differ.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--concepts", type=options.concepts, help="a concepts.safetensors file, or its folder"
    )
    what.add_argument(
        "--dreambench",
        type=Path,
        help="DreamBench's folder: learn each of its subjects, then measure",
    )
    what.add_argument(
        "--coco", type=Path, help="COCO's folder: learn scenes of it, then measure, as in the paper"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and reports")
    add_concept_options(parser)
    add_encoders(parser)
    add_drawing(parser)
    add_benchmark_options(parser)
    add_quiet(parser)
    add_model(parser)
    parser.set_defaults(run=run_command)


def add_concept_options(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to `--concepts`."""
    parser.add_argument(
        "--prompts",
        type=Path,
        help="a text file with one prompt per line, which marks concepts as <name>; needed with --concepts",
    )
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=[],
        help="the pictures that the concepts were learned from, in their order, to compare with; without "
        "them, neither identity nor mixing is measured",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        nargs="+",
        default=[],
        help="folders of mask_<concept>.png, one per picture, to use in place of the masks that were found in "
        "learning",
    )
    add_any_weights(parser)


def add_encoders(parser: argparse.ArgumentParser) -> None:
    """Add the encoders that measure."""
    parser.add_argument(
        "--clip",
        help="CLIP as transformers has it, a folder or a name on the model hub: prompt agreement and identity",
    )
    parser.add_argument(
        "--dino",
        help="DINO or DINOv2 as transformers has it, a folder or a name on the model hub: identity, mixing, and "
        "diversity if there is no --lpips",
    )
    parser.add_argument(
        "--lpips",
        type=Path,
        help="folder with the .safetensors file of VGG16 or AlexNet, named as in torchvision: diversity",
    )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Add how pictures are drawn and searched."""
    parser.add_argument(
        "--count",
        type=options.positive,
        default=PICTURES_PER_PROMPT,
        help="pictures per prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="seed of each prompt's first picture; each further one adds 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--sampling-steps",
        type=options.positive,
        default=30,
        help="sampling steps (default: %(default)s)",
    )
    add_guidance(parser)
    parser.add_argument(
        "--passes",
        type=options.positive,
        default=20,
        help="number of noise samples to find a concept's mask in a picture with (default: %(default)s)",
    )


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to `--dreambench` and `--coco`."""
    parser.add_argument(
        "--coco-split", default="val2017", help="part of COCO's data (default: %(default)s)"
    )
    parser.add_argument(
        "--coco-concepts",
        type=options.positive,
        default=CONCEPTS,
        help="how many of COCO's concepts to learn (default: %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--cases", type=options.positive, help="measure only the first so many cases"
    )
    parser.add_argument(
        "--mode",
        choices=("em", "fixed", "given", "none"),
        default="em",
        help="where a benchmark's masks come from in learning; given is for COCO (default: %(default)s)",
    )
    parser.add_argument(
        "--joint",
        choices=("none", "lora"),
        default="none",
        help="what to learn besides the tokens of a benchmark's concepts (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=options.positive, help="steps of learning (default: what suits the model)"
    )


def run_command(args: argparse.Namespace) -> int:
    """Measure the concepts of a file, or of a benchmark's cases one after the other."""
    one = args.concepts is not None
    if one and args.prompts is None:
        raise UserError(
            "--concepts needs --prompts. Expected a text file with one prompt per line."
        )
    if not one and (args.prompts or args.image or args.masks):
        raise UserError(
            "--prompts, --image and --masks belong to --concepts; a benchmark has its own."
        )
    if not args.quiet:
        load_tqdm()
    concepts = ConceptSet.load(args.concepts) if one else None
    prompts = read_prompts(read_lines(args.prompts)) if one else ()
    if concepts is not None:
        require_prompts(prompts, concepts)
    examples = learned_from(args, concepts) if concepts else []
    cases = [] if one else cases_of(args)
    instruments = load_instruments(args)
    host = load_host(args.model, args.device, args.dtype)
    require_folder(args.out)
    if concepts is None:
        return run_cases(args, host, instruments, cases)
    concepts.require_fit(host.identity(), any_weights=args.any_weights)
    drawing = drawing_of(args, str(args.concepts))
    _, rows = evaluate_into(args.out, host, concepts, prompts, examples, instruments, drawing)
    say(args, f"{table(rows)}\n\nThe report: {args.out / 'report.html'}")
    return 0


def run_cases(
    args: argparse.Namespace, host: DiffusersHost, instruments: Instruments, cases: Sequence[Case]
) -> int:
    """Learn and measure each case in a folder of its own, then all of them together."""
    evaluations: dict[str, Evaluation] = {}
    family = host.identity().family
    em = replace(em_settings(family), mode=args.mode)
    em = replace(em, steps=args.steps) if args.steps else em
    joint = joint_settings(family, args.joint)
    for number, case in enumerate(cases, start=1):
        say(args, f"{number} of {len(cases)}: {case.name}")
        folder, examples = args.out / case.name, case.read()
        progress = Progress(args.quiet)
        concepts = learn_concepts(
            host, examples, em, joint, listeners=[progress], store=RunStore(folder / "run")
        )
        progress.close()
        concepts.save(folder / "concepts.safetensors")
        drawing = drawing_of(args, case.name)
        evaluations[case.name], rows = evaluate_into(
            folder, host, concepts, case.prompts, examples, instruments, drawing
        )
        say(args, f"{table(rows)}\n")
    facts = {
        "benchmark": "DreamBench" if args.dreambench else f"COCO {args.coco_split}",
        "cases": str(len(cases)),
        "learned": f"mode {args.mode}, {em.steps} steps, joint {args.joint}",
        **drawing_of(args, "").facts,
    }
    rows = write_overview(args.out, f"Evaluation on {facts['benchmark']}", evaluations, facts)
    say(args, f"{table(rows)}\n\nThe report: {args.out / 'report.html'}")
    return 0


def read_lines(file: Path) -> str:
    """Return a text file's content.

    Raises:
        UserError: it is not there, or not text in UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Could not read {file} ({error}). Expected a text file in UTF-8 with one prompt per line."
        ) from error


def learned_from(args: argparse.Namespace, concepts: ConceptSet) -> list[Example]:
    """Read the pictures that the concepts were learned from, with given masks.

    Raises:
        UserError: their number is wrong, or one of them cannot be read.
    """
    if args.masks and len(args.masks) != len(args.image):
        raise UserError(
            f"Bad number of mask folders. Expected {len(args.image)} (one per picture of --image), got "
            f"{len(args.masks)}."
        )
    if not args.image:
        return []
    examples = examples_again(concepts, [read_picture(file) for file in args.image])
    if not args.masks:
        return examples
    return [
        replace(example, masks=read_masks(folder, example.prompt.names, all_needed=False))
        for example, folder in zip(examples, args.masks, strict=True)
    ]


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the benchmark's cases.

    Raises:
        UserError: the data is not laid out as it should be, or has no masks to learn under.
    """
    if args.dreambench is not None and args.mode == "given":
        raise UserError(
            "DreamBench has no masks, so --mode given cannot learn from it. Use --mode em."
        )
    cases = (
        dreambench_cases(args.dreambench)
        if args.dreambench is not None
        else coco_cases(args.coco, args.coco_split, args.coco_concepts)
    )
    return cases[: args.cases]


def load_instruments(args: argparse.Namespace) -> Instruments:
    """Load the encoders that are named.

    Raises:
        UserError: none is named, or one cannot be loaded.
    """
    quiet_libraries()
    device = torch_device(args.device)
    clip = Clip.load(args.clip, device) if args.clip else None
    dino = Dino.load(args.dino, device) if args.dino else None
    looks = {name: of for name, of in ((CLIP_IMAGE, clip), (DINO, dino)) if of is not None}
    lpips = Lpips.load(args.lpips, device) if args.lpips else None
    return Instruments(clip, looks, lpips)


def drawing_of(args: argparse.Namespace, source: str) -> Drawing:
    """Return how pictures are drawn, and what the report says of it."""
    given = {"CLIP": args.clip, "DINO": args.dino, "LPIPS": args.lpips}
    facts = {"concepts": source} if source else {}
    facts |= {"model": args.model}
    facts |= {name: str(source) for name, source in given.items() if source}
    return Drawing(
        seeds=tuple(range(args.seed, args.seed + args.count)),
        steps=args.sampling_steps,
        guidance=args.guidance,
        passes=args.passes,
        facts=facts,
        bar=None if args.quiet else load_tqdm(),
    )
