"""`python -m em_core learn`: learn concepts and masks from pictures."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..examples import Example
from ..jobs.inputs import CONCEPTS, CONDITION
from ..jobs.outputs import mask_file
from ..method.discover import nameless
from ..model.jobs import Work
from ..pictures import read_picture
from ..presets import em_settings, joint_settings, literal
from ..prompts import ConceptPrompt
from ..runs.concept_set import ConceptSet
from ..runs.finding import MOST
from ..runs.key import part_digests, run_parts
from ..runs.learning import require_start
from ..runs.visual_condition import VisualCondition
from ..settings import EMSettings, JointSettings, Mode
from . import options
from .common import (
    add_plan,
    add_source,
    load_planned,
    read_examples,
    require_folder,
)
from .learning import DISCOVER, Learning
from .results import CURVES, METRICS, read_made_from
from .visual import add_learning_options, concepts_of, visual_of
from .writing import add_output_options, require_new, say

STATE = "state.safetensors"
INSTEAD = "Choose another folder with --out, or replace them with --overwrite."
ANY_PROMPT = ConceptPrompt.parse("<concept>")  # until there is one
EXAMPLE = """example:
  python -m em_core scene --seed 3 --out output/scene
  python -m em_core learn --image output/scene/image.png \\
      --prompt "$(cat output/scene/prompt.txt)" --truth output/scene --out output/learned"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the `learn` command."""
    parser = subparsers.add_parser(
        "learn",
        help="learn concepts and their masks from pictures",
        description="Learn a token for each concept that the prompts mark, and find each concept's mask.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, help="one or more pictures")
    parser.add_argument(
        "--prompt",
        nargs="+",
        default=[],
        help="one prompt per picture, or one for all, such as: a photo of <rex:dog> on grass; none with "
        "--mode discover",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    add_em_options(parser)
    add_joint_options(parser)
    add_learning_options(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run that was stopped in --out; start it if there is none, and do nothing if it is "
        "finished",
    )
    add_output_options(parser)
    add_plan(parser)
    add_source(parser)
    parser.set_defaults(run=run_command)


def add_em_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the EM loop."""
    parser.add_argument(
        "--mode",
        choices=("em", "fixed", "given", "none", DISCOVER),
        default="em",
        help="where masks come from: em finds them while learning, fixed finds them once at the start, "
        "given takes yours, none uses no masks; discover also finds what there is to learn, without a prompt, "
        "and goes on as em (default: %(default)s)",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        nargs="+",
        default=[],
        help="folders of mask_<concept>.png, one per picture, for --mode given; each opaque where its concept "
        "is, or white there if it is opaque throughout",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        nargs="+",
        default=[],
        help="folders of true masks (mask_<concept>.png), one per picture, for the IoU curves",
    )
    parser.add_argument(
        "--steps",
        type=options.positive,
        help="steps of the EM loop (default: 400, or 120 with the demo model)",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="seed of everything random (default: %(default)s)",
    )
    parser.add_argument(
        "--vectors",
        type=options.whole(1, 32),
        default=1,
        help="token vectors per concept (default: %(default)s)",
    )
    parser.add_argument(
        "--learning-rate",
        type=options.rate,
        help="learning rate of the token vectors (default: what suits the model)",
    )
    parser.add_argument(
        "--literal",
        action="store_true",
        help="run the paper's own loop, with an E-step after every step",
    )
    parser.add_argument(
        "--no-crf", action="store_true", help="do not refine masks with the DenseCRF"
    )


def add_joint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the joint phase."""
    parser.add_argument(
        "--joint",
        choices=("none", "lora", "cross_attention", "full"),
        default="none",
        help="what to learn afterwards, together with the tokens: a LoRA, the keys and values of "
        "cross-attention, or all weights (default: %(default)s)",
    )
    parser.add_argument(
        "--joint-steps",
        type=options.positive,
        help="steps of the joint phase (default: 400, or 100 with the demo model)",
    )
    parser.add_argument(
        "--joint-learning-rate",
        type=options.rate,
        help="learning rate of the weights (default: what suits the model and the kind of joint phase)",
    )
    parser.add_argument(
        "--prior-weight",
        type=options.not_negative,
        default=0.0,
        help="weight of prior preservation in the joint phase; 0 is off (default: %(default)s)",
    )


def settings_of(args: argparse.Namespace, family: str) -> tuple[EMSettings, JointSettings]:
    """Return the settings of both phases: the family's defaults with the given options applied."""
    em, joint = em_settings(family), joint_settings(family, args.joint)
    changes = {"steps": args.steps, "learning_rate": args.learning_rate}
    mode: Mode = "em" if args.mode == DISCOVER else args.mode
    em = replace(em, mode=mode, seed=args.seed, vectors=args.vectors)
    em = replace(em, **{name: value for name, value in changes.items() if value is not None})
    em = literal(em) if args.literal else em
    em = replace(em, masks=replace(em.masks, crf=None)) if args.no_crf else em
    changes = {"steps": args.joint_steps, "learning_rate": args.joint_learning_rate}
    joint = replace(joint, prior_weight=args.prior_weight)
    return em, replace(
        joint, **{name: value for name, value in changes.items() if value is not None}
    )


def run_command(args: argparse.Namespace) -> int:
    """Learn and write the results; a run that is stopped says how to continue it."""
    require_folder(args.out)
    state_file = args.out / STATE
    if not args.resume:
        require_no_state(state_file)
        require_no_concepts(args)
    require_inputs(args)
    examples = [Example(read_picture(args.image[0]), ANY_PROMPT)]
    if args.mode != DISCOVER:
        examples = read_examples(args.image, args.prompt, args.masks, args.truth)
    is_over = (args.out / CONCEPTS).is_file() and not args.overwrite
    if not state_file.is_file() and not is_over:
        require_new(results_of(args, examples), args.overwrite)
    model = load_planned(args.model, args.device, args.plan, args.quiet)
    family = model.identity.family
    em, joint = settings_of(args, family)
    em, visual = visual_of(args, em, family)
    known = concepts_of(args, model.identity)
    if known is not None and visual is None:
        require_start(known, joint)
    digest = model.digest(joint)
    parts = part_digests(run_parts(digest, examples, em, joint, visual, known))
    if is_over and not state_file.is_file():
        require_same(args, parts)
        say(args, f"The run in {args.out} is finished; nothing is left to do.")
        return 0
    learning = Learning(args, digest, known, state_file, parts)
    return model.carry_out(Work(examples, em, joint, visual), learning)


def results_of(args: argparse.Namespace, examples: Sequence[Example]) -> list[Path]:
    """Return the files that a run writes into --out; without a prompt, those that it may write."""
    several = len(examples) > 1
    masks = [
        mask_file(name, number if several else None)
        for number, example in enumerate(examples, start=1)
        for name in (nameless(MOST) if args.mode == DISCOVER else example.prompt).names
    ]
    names = [CONCEPTS, *[CONDITION] * bool(args.visual), CURVES, METRICS]
    return [args.out / name for name in [*names, *masks * (args.mode != "none")]]


def require_inputs(args: argparse.Namespace) -> None:
    """Refuse a mode without what it needs, or with what it cannot use.

    Raises:
        UserError: masks, prompts or marks in them are missing, or there is something that nothing would
            come of.
    """
    if args.mode == "given" and not args.masks:
        raise UserError(
            "--mode given needs --masks. Expected a folder with mask_<concept>.png for each picture."
        )
    if args.masks and args.mode != "given":
        raise UserError(
            f"--mode {args.mode} does not use --masks. Add --mode given to learn under them, or name them --truth "
            "to compare with them."
        )
    if args.mode == DISCOVER:
        require_nothing_named(args)
        return
    if not args.prompt:
        raise UserError(
            "No prompt. Expected --prompt with the concepts marked, as in: a photo of <rex:dog> on grass. "
            "Without words for what the picture shows, use --mode discover."
        )
    for text in args.prompt:
        require_marks(text)


def require_nothing_named(args: argparse.Namespace) -> None:
    """Refuse names for what is to be discovered.

    Raises:
        UserError: there are some, or several pictures.
    """
    if args.prompt or args.truth or len(args.image) > 1:
        raise UserError(
            "--mode discover names what it finds by itself, concept1 and so on from left to right. Expected one "
            "picture, and neither --prompt nor --truth."
        )


def require_marks(text: str) -> None:
    """Refuse a prompt that marks nothing to learn.

    Raises:
        UserError: it is of that kind, or malformed.
    """
    if not ConceptPrompt.parse(text).names:
        raise UserError(
            f"No concept in the prompt {text!r}. Mark what to learn, as in --prompt 'a photo of <rex:dog> on "
            "grass'; its mask, for --mode given or --truth, is then mask_rex.png. Without words for what the "
            "picture shows, use --mode discover."
        )


def require_no_state(file: Path) -> None:
    """Refuse to start over what was stopped.

    Raises:
        UserError: there is the file of a stopped run.
    """
    if file.is_file():
        raise UserError(
            f"{file.parent} holds a run that was stopped. Continue it with --resume, or delete {file.name} "
            "there to start over."
        )


def require_same(args: argparse.Namespace, parts: Mapping[str, str]) -> None:
    """Refuse to take the result of another run for this one's.

    Args:
        args: the options, of which --out is the folder of the finished run.
        parts: digests of what this run is made from.

    Raises:
        UserError: that one was made from something else, or its files are damaged.
    """
    out = args.out
    made = read_made_from(out / METRICS)
    other = [name for name, digest in parts.items() if made.get(name) != digest]
    if other:
        raise UserError(
            f"{out} holds the concepts of a finished run that had other {' and other '.join(other)}. {INSTEAD}"
        )
    ConceptSet.load(out / CONCEPTS)
    if args.visual is not None:
        VisualCondition.load(out / CONDITION)


def require_no_concepts(args: argparse.Namespace) -> None:
    """Refuse to replace the concepts of a finished run unasked.

    Raises:
        UserError: they are there.
    """
    if (args.out / CONCEPTS).is_file() and not args.overwrite:
        raise UserError(f"{args.out} holds the concepts of a finished run. {INSTEAD}")
