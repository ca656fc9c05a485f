"""The workflows that run on the demo model and are about masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from templates.boxes import column, group, row
from templates.editor import Placed, Sheet
from templates.parts import draw, read, show, show_masks

Info = Mapping[str, Any]
STEPS = 120
"""Of learning a token of the demo model."""


def scene(sheet: Sheet, kind: str, seed: int, title: str = "") -> Placed:
    return sheet.add("ConceptDemoScene", title=title, width=240, seed=seed, kind=kind)


def learn(sheet: Sheet, model: Placed, examples: Placed, **changes: Any) -> Placed:
    values = {"mode": "find and improve", "steps": STEPS, "joint": "nothing"} | changes
    return sheet.add(
        "LearnConcepts", model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"], examples=examples,
        **values,
    )  # fmt: skip


def apply(sheet: Sheet, model: Placed, concepts: Placed, **more: Any) -> Placed:
    return sheet.add(
        "ApplyConceptTokens", model=model["MODEL"], clip=model["CLIP"], concepts=concepts, **more
    )


def text_to_mask(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "03 Text to mask, heat maps",
        "Finds what the prompt marks: heat maps, masks, and masks that follow the picture's edges.",
    )
    note = sheet.note(
        "Mark what to find in the prompt, as in `<any_name:words>`. *Extract Latent Masks* reads where the "
        "model looks for each word (the heat maps) and cuts masks from it; *Refine Masks (DenseCRF)* makes "
        "them follow the picture's edges.\n\n**Your own picture:** mark the background too, as in `a photo "
        "of <cat:cat> on <sofa:sofa>`: the masks get sharper. Choose the preset `local_colour`.",
        width=300,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (280, 280))
    prompt = read(sheet, picture["prompt"], "The prompt in use", 320)
    found = sheet.add(
        "ExtractLatentMasks", width=320, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"],
        image=picture["IMAGE"], prompt=picture["prompt"], crf="off",
    )  # fmt: skip
    heat = show(sheet, found["heat maps"], "Heat maps", (320, 290))
    rough = show_masks(sheet, found["masks"], "Masks as found", (280, 320))
    refined = sheet.add(
        "RefineCRF", width=280, image=picture["IMAGE"], mask=found["masks"], preset="demo"
    )
    fine = show_masks(sheet, refined, "Refined masks", (300, 320))
    compared = sheet.add("CompareConceptMasks", width=300, mask=refined, reference=picture["MASK"])
    overlay = show(sheet, compared["overlay"], "Against the true masks", (300, 260))
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Find", column(found, prompt), column(heat, rough)),
            group("3  Refine", column(refined, fine)),
            group("How good?", column(compared, overlay)),
        )
    )
    return sheet


def refine_any_mask(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "04 Refine any mask",
        "Makes rough masks from anywhere follow the edges of the picture.",
    )
    note = sheet.note(
        "The masks here are too fat on purpose (*Grow Mask*). *Refine Masks (DenseCRF)* brings them back to "
        "the edges of the picture, and *Compare Masks* says by how much: before, and after.\n\n**Your own "
        "masks:** paint one in *Load Image*'s mask editor, or connect any node that gives a MASK; choose "
        "`local_colour`, for photos.",
        width=300,
    )
    picture = scene(sheet, "A", 5)
    seen = show(sheet, picture["IMAGE"], "The picture", (280, 260))
    fat = sheet.add(
        "GrowMask", title="Make them rough", mask=picture["MASK"], expand=6, tapered_corners=False,
    )  # fmt: skip
    rough = show_masks(sheet, fat, "Rough masks", (280, 260))
    before = sheet.add("CompareConceptMasks", title="Before", mask=fat, reference=picture["MASK"])
    refined = sheet.add("RefineCRF", width=300, image=picture["IMAGE"], mask=fat, preset="demo")
    fine = show_masks(sheet, refined, "Refined masks", (300, 300))
    after = sheet.add("CompareConceptMasks", title="After", mask=refined, reference=picture["MASK"])
    seen_after = show(
        sheet, after["overlay"], "White: right, red: too much, blue: missing", (320, 300)
    )
    seen_before = show(sheet, before["overlay"], "The same before", (300, 300))
    sheet.arrange(
        row(
            column(note, group("1  Picture", column(picture, seen))),
            group("2  Rough masks", column(fat, rough)),
            group("3  Refine", column(refined, fine)),
            group("How good?", column(before, seen_before), column(after, seen_after)),
        )
    )
    return sheet


def em_beside_fixed(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "06 Improved and fixed masks",
        "Learns the same picture twice, with masks that are updated (EM) and masks that stay, and compares.",
    )
    note = sheet.note(
        "Both runs learn the two hearts of one picture; the box beside them is not in the prompt. *find and "
        "improve* finds the masks again and again while the words are learned (EM); *find once* keeps the "
        "first ones, in which `<rex>` has the box too. White is right, red is too much, blue is missing; the "
        "true masks are only compared with. The curves show the overlap with them (IoU), step by step.\n\n"
        "Where the first masks are right, as in most scenes, both ways end alike. Try other seeds and kinds "
        "of *Demo Scene*: G and F are hard.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "J", 12)
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add(
        "ConceptExample", width=272, image=picture["IMAGE"], prompt=picture["prompt"], masks=picture["MASK"],
    )  # fmt: skip
    ways = (("find and improve", "Improved while learning (EM)"), ("find once", "Found once"))
    learned = [learn(sheet, model, example, mode=mode) for mode, _ in ways]
    lanes = [group(title, run) for run, (_, title) in zip(learned, ways, strict=True)]
    sides, numbers = [], []
    for run, name in zip(learned, ("improved", "found once"), strict=True):
        compared = sheet.add(
            "CompareConceptMasks",
            title=f"IoU: {name}",
            width=305,
            mask=run["masks"],
            reference=picture["MASK"],
        )
        overlay = show(sheet, compared["overlay"], f"Against the true masks: {name}", (305, 266))
        sides.append(column(compared, overlay))
        numbers.append(read(sheet, compared["text"], f"Overlap: {name}", 220))
    curves = show(sheet, learned[0]["curves"], "Curves: improved", (390, 330))
    sheet.arrange(
        row(
            column(note, group("Picture and prompt", column(model, picture, example))),
            column(row(*lanes), prompt),
            group("Which masks are better?", column(row(*sides), row(curves, column(*numbers)))),
        )
    )
    return sheet


def discover(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "07 What is in this picture",
        "Finds the things in a picture without a word about them, learns one and draws it elsewhere.",
    )
    note = sheet.note(
        "*Discover Concepts* counts the things in a picture without being told what they are, and gives each "
        "a mask and a name: `<concept1>`, `<concept2>`, ... from left to right. Its *examples* go straight "
        "to *Learn Concepts*; *given* learns under the masks that were found.\n\nAll that is learned is a "
        "token: kind and colours come, patterns about half of the time. What the demo model cannot draw at "
        "all, such as the looks of *Demo Scene*'s other kinds, no token makes it draw.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (240, 246))
    found = sheet.add(
        "DiscoverConcepts", width=300, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"],
        image=picture["IMAGE"],
    )  # fmt: skip
    prompt = read(sheet, found["prompt"], "The prompt that it wrote", 320)
    masks = show_masks(sheet, found["masks"], "What it found", (300, 280))
    learned = learn(sheet, model, found["examples"], mode="given")
    applied = apply(sheet, model, learned)
    new = draw(
        sheet, applied, applied["CLIP"], model["VAE"], "a photo of <concept1> on sand", "discovered"
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Discover", column(found, masks)),
            group("3  Learn", column(learned, prompt)),
            group("4  Draw one of them", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet
