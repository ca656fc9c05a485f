"""Scores of four pictures, made up by hand."""

import torch

from em_core.evaluate.evaluation import Evaluation, PictureScores
from em_core.prompts import ConceptPrompt


def scored(prompt: int, seed: int, **values: float) -> PictureScores:
    keys = {
        tuple(name.split("__")) if "__" in name else (name, ""): v for name, v in values.items()
    }
    crops = {c: torch.zeros(3, 2, 2) for (m, c), v in keys.items() if m == "found" and v}
    return PictureScores(prompt, seed, keys, crops)  # type: ignore[arg-type]


def evaluation() -> Evaluation:
    prompts = ("a <a> and a <b>", "a <a>")
    return Evaluation(
        prompts=tuple(map(ConceptPrompt.parse, prompts)),
        seeds=(4, 5),
        concepts=("a", "b"),
        pictures=(
            scored(0, 4, prompt_agreement=0.3, found__a=1, found__b=0, dino__a=0.8, mixed__a=0),
            scored(0, 5, prompt_agreement=0.1, found__a=1, found__b=1, dino__a=0.6, dino__b=0.5, mixed__a=0,
                   mixed__b=1),
            scored(1, 4, prompt_agreement=0.4, found__a=1, dino__a=0.9, mixed__a=0),
            scored(1, 5, prompt_agreement=0.2, found__a=0),
        ),
        diversity=({"1_minus_dino": 0.2}, {"1_minus_dino": 0.4}),
        references={"a": (torch.ones(3, 2, 2),), "b": (torch.ones(3, 2, 2),)},
        judge="dino",
    )  # fmt: skip
