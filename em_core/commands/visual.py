"""What the commands `learn` and `generate` have for the visual condition."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..hosts.diffusers import DiffusersHost
from ..jobs.inputs import CONDITION
from ..model.identity import ModelIdentity
from ..pictures import read_picture
from ..presets import vico, visual_settings
from ..runs.concept_set import ConceptSet
from ..runs.visual import with_reference
from ..runs.visual_condition import VisualCondition
from ..settings import EMSettings, VisualSettings
from . import options
from .common import read_masks


def add_learning_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the visual phase."""
    parser.add_argument(
        "--visual",
        nargs="?",
        const="default",
        choices=("default", "vico"),
        help="also learn a visual condition: image attention that looks at the pictures while drawing. vico is "
        "the method as it was published, for one concept and without an EM loop (default: default)",
    )
    parser.add_argument(
        "--visual-steps",
        type=options.positive,
        help="steps of the visual phase (default: 400, or 200 with the demo model)",
    )
    parser.add_argument(
        "--concepts",
        type=options.concepts,
        help="a concepts.safetensors file, or its folder, to go on from, such as `import` writes; a visual "
        "condition that starts from all that it marks has no EM loop",
    )


def visual_of(
    args: argparse.Namespace, em: EMSettings, family: str
) -> tuple[EMSettings, VisualSettings | None]:
    """Return the settings of the EM loop and of the visual phase, if there is one."""
    if args.visual is None:
        return em, None
    visual = visual_settings(family)
    if args.visual_steps is not None:
        visual = replace(visual, steps=args.visual_steps)
    return vico(em, visual) if args.visual == "vico" else (em, visual)


def concepts_of(args: argparse.Namespace, model: ModelIdentity) -> ConceptSet | None:
    """Return the concepts to start from, if any are named.

    Raises:
        UserError: the file cannot be read, or is of another model.
    """
    if args.concepts is None:
        return None
    concepts = ConceptSet.load(args.concepts)
    concepts.require_fit(model)
    return concepts


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of drawing with a visual condition."""
    parser.add_argument(
        "--condition",
        type=options.condition,
        help=f"a {CONDITION} file of learn --visual, or its folder",
    )
    parser.add_argument(
        "--strength",
        type=options.number(0.0, 2.0),
        default=1.0,
        help="how strongly the condition acts, 0 to 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--span",
        type=options.number(0.0, 1.0),
        nargs=2,
        default=(0.0, 1.0),
        metavar=("START", "END"),
        help="part of the sampling in which the condition acts, in shares of it (default: 0 1)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        help="a picture to look at, in place of those that the condition was learned from",
    )
    parser.add_argument(
        "--reference-masks",
        type=Path,
        help="folder of mask_<concept>.png of the reference (default: the concepts are found in it)",
    )


def condition_of(
    args: argparse.Namespace, condition: VisualCondition | None, host: DiffusersHost
) -> VisualCondition | None:
    """Return the condition that looks at what the options say.

    Raises:
        UserError: the reference cannot be used.
    """
    if condition is None or args.reference is None:
        return condition
    masks = None
    if args.reference_masks is not None:
        masks = read_masks(args.reference_masks, condition.names, all_needed=False)
    return with_reference(host, condition, read_picture(args.reference), masks)
