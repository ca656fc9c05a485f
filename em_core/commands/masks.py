"""`python -m em_core masks`: masks of words or learned concepts in a picture."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ..concept_set import ConceptSet
from ..concepts import ConceptPrompt
from ..diffusers_host import DiffusersHost
from ..em import attention_masks
from ..errors import UserError
from ..examples import Example
from ..masks import Threshold
from ..pictures import overlay, read_picture, save_image, save_mask, to_image
from ..presets import em_settings
from ..problem import prepare
from .common import add_model, load_host

EXAMPLE = """examples:
  python -m em_core masks --image photo.png --prompt "a photo of <a:star> and <b:heart> on grass" --out output/masks
  python -m em_core masks --image photo.png --prompt "a photo of <rex> on sand" \\
      --concepts output/learned/concepts.safetensors --out output/masks"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "masks",
        help="masks of words or learned concepts in a picture",
        description="Read masks off the cross-attention: of words (<name:words>) or of learned concepts (<name>).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument(
        "--prompt", required=True, help="what is to be found stands as <name:words> or <name>"
    )
    parser.add_argument("--concepts", type=Path, help="a concepts.safetensors file")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for mask_<name>.png, heat_<name>.png, overlay.png",
    )
    parser.add_argument("--passes", type=int, default=50, help="noise samples that are averaged")
    parser.add_argument("--threshold", default=None, help="0..1 on the normalised map, or otsu")
    parser.add_argument(
        "--no-crf", action="store_true", help="do not refine the masks with the DenseCRF"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--any-weights", action="store_true", help="also on a fine-tune of the model they come from"
    )
    add_model(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Write masks, heat maps and an overlay."""
    example = Example(read_picture(args.image), ConceptPrompt.parse(args.prompt).require_concepts())
    host = load_host(args.model, args.device)
    vectors = known_vectors(args, host, example.prompt)
    settings = em_settings(host.identity().family)
    masks = replace(settings.masks, init_timesteps=args.passes)
    masks = replace(masks, crf=None) if args.no_crf else masks
    masks = (
        masks
        if args.threshold is None
        else replace(masks, threshold=read_threshold(args.threshold))
    )
    problem = prepare(host, [example], replace(settings, masks=masks))
    generator = torch.Generator().manual_seed(args.seed)
    maps, estimate = attention_masks(problem, problem.pictures[0], vectors, args.passes, generator)
    height, width = example.picture.shape[-2:]
    labels = torch.nn.functional.interpolate(
        estimate.masks[None].float(), size=(height, width), mode="bilinear"
    )[0]
    for name, A, mask in zip(example.prompt.names, maps, estimate.masks, strict=True):
        save_mask(args.out / f"mask_{name}.png", mask, (height, width))
        save_image(args.out / f"heat_{name}.png", to_image(A[None]).resize((width, height)))
    save_image(args.out / "overlay.png", overlay(example.picture, labels > 0.5))
    return 0


def known_vectors(
    args: argparse.Namespace, host: DiffusersHost, prompt: ConceptPrompt
) -> dict[str, dict[str, torch.Tensor]]:
    """Vectors of learned concepts where there is a file, of the words otherwise."""
    vectors: dict[str, dict[str, torch.Tensor]] = {}
    if args.concepts is not None:
        concepts = ConceptSet.load(args.concepts)
        concepts.require_fit(host.identity(), any_weights=args.any_weights)
        vectors = {name: dict(of) for name, of in concepts.vectors.items()}
    for concept in prompt.concepts:
        if concept.name in vectors:
            continue
        if not concept.words:
            raise UserError(
                f"Nothing is known of <{concept.name}>. Give words, as in <{concept.name}:dog>, or --concepts."
            )
        count = max(1, len(host.pieces(concept.words)))
        vectors[concept.name] = host.initial_vectors(concept.words, count, torch.Generator())
    return vectors


def read_threshold(text: str) -> Threshold:
    """A number in 0..1, or "otsu"."""
    if text == "otsu":
        return "otsu"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UserError(f"Bad threshold {text!r}. Expected a number between 0 and 1, or otsu.")
    return value
