"""The workflows that run on the demo model, on any computer and without a download."""

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


def two_together(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "01 Learn two concepts and draw them together",
        "Learns two objects and their masks from one picture, then draws both in a new place.",
    )
    note = sheet.note(
        "Press **Run**. *Demo Scene* shows two objects that the model has never seen; *Learn Concepts* learns a "
        "word and a mask for each. Behind *Apply Concept Tokens*, `<rex>` and `<doll>` work in any prompt.\n\n"
        "**Your own picture:** *Load Checkpoint* and *Load Image* in place of the demo nodes, a prompt such as "
        "`a photo of <rex:dog> on <shore:beach>`, 400 steps, nothing in *masks*, and your model's picture size.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (240, 246))
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add(
        "ConceptExample", width=320, image=picture["IMAGE"], prompt=picture["prompt"],
        masks=picture["MASK"],
    )  # fmt: skip
    learned = learn(sheet, model, example, joint="LoRA")
    curves = show(sheet, learned["curves"], "Curves", (320, 246))
    saved = sheet.add(
        "SaveConcepts", width=330, concepts=learned, name="demo_concepts", overwrite=True, exports=True,
        clip=model["CLIP"],
    )  # fmt: skip
    applied = apply(sheet, model, learned)
    new = draw(sheet, applied, applied["CLIP"], model["VAE"], "a photo of <rex> and <doll> on sand", "concepts")
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Learn and save", column(example, curves, saved), column(learned, prompt)),
            group(
                "3  Draw",
                column(applied, new.text()),
                new.drawn(),
            ),
        )
    )
    return sheet


def other_background(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "02 Subject of one picture, background of another",
        "Learns the objects of one picture and the background of another, and draws them together.",
    )
    note = sheet.note(
        "Two *Concept Example* nodes in a row are learned together. The first picture brings `<rex>` and `<doll>`, "
        "the second its ground: a background is a concept like any other, here `<place:grass>`.\n\n**Your own pictures:** give each its prompt, and mark only what you want to learn.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    first = scene(sheet, "A", 3, "First: the subject")
    second = scene(sheet, "I", 3, "Second: the background")
    both = sheet.add(
        "BatchImagesNode", width=320, images__image0=first["IMAGE"], images__image1=second["IMAGE"]
    )
    seen = show(sheet, both, "Both pictures", (320, 250))
    prompt = read(sheet, first["prompt"], "The first picture's prompt", 272)
    subject = sheet.add(
        "ConceptExample", title="Example of the subject", width=320, image=first["IMAGE"], prompt=first["prompt"],
    )  # fmt: skip
    ground = sheet.add(
        "ConceptExample", title="Example of the background", width=320, image=second["IMAGE"],
        prompt="a photo of <box:square> and <ball:circle> on <place:grass>", examples=subject,
    )  # fmt: skip
    learned = learn(sheet, model, ground)
    applied = apply(sheet, model, learned)
    new = draw(sheet, applied, applied["CLIP"], model["VAE"], "a photo of <rex> on <place>", "other_background")
    sheet.arrange(
        row(
            column(note, group("1  Two pictures", column(model, first, second)), prompt),
            group("2  Their prompts", column(subject, ground, both, seen)),
            group("3  Learn from both", learned),
            group("4  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def text_to_mask(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "03 Text to mask with heat maps",
        "Finds what the prompt marks: heat maps, masks, and masks that follow the picture's edges.",
    )
    note = sheet.note(
        "Mark what to find in the prompt, as in `<any_name:words>`. *Extract Latent Masks* reads where the model "
        "looks for each word (the heat maps) and cuts masks from it; *Refine Masks (DenseCRF)* makes them follow the "
        "picture's edges.\n\n**Your own picture:** mark the background too, as in `a photo of <cat:cat> on "
        "<sofa:sofa>`: the masks get sharper. Choose the preset `local_colour`.",
        width=300,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (280, 280))
    prompt = read(sheet, picture["prompt"], "The prompt in use", 300)
    found = sheet.add(
        "ExtractLatentMasks", width=320, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"],
        image=picture["IMAGE"], prompt=picture["prompt"], crf="off",
    )  # fmt: skip
    heat = show(sheet, found["heat maps"], "Heat maps", (320, 320))
    rough = show_masks(sheet, found["masks"], "Masks as found", (280, 320))
    refined = sheet.add("RefineCRF", width=280, image=picture["IMAGE"], mask=found["masks"], preset="demo")
    fine = show_masks(sheet, refined, "Refined masks", (300, 320))
    compared = sheet.add("CompareConceptMasks", width=300, mask=refined, reference=picture["MASK"])
    overlay = show(sheet, compared["overlay"], "Against the true masks", (300, 260))
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Find", column(found, heat), column(prompt, rough)),
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
        "The masks here are too fat on purpose (*Grow Mask*). *Refine Masks (DenseCRF)* brings them back to the "
        "edges of the picture, and *Compare Masks* says by how much: before, and after.\n\n**Your own masks:** paint "
        "one in *Load Image*'s mask editor, or connect any node that gives a MASK; choose `local_colour`, for "
        "photos.",
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
    seen_after = show(sheet, after["overlay"], "White: right, red: too much, blue: missing", (320, 300))
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


def layout(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "05 Lay out concepts by masks",
        "Says where in the picture each learned concept goes.",
    )
    note = sheet.note(
        "*masks* on *Apply Concept Tokens* keep each concept in its part of the picture: one mask for each, in the "
        "order of the prompt. Here `<rex>` gets the right half and `<doll>` the left, the other way round than in "
        "the picture that they were learned from.\n\nPaint your own masks, or take them from *Extract Latent "
        "Masks* of any picture whose layout you like.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add("ConceptExample", width=272, image=picture["IMAGE"], prompt=picture["prompt"])
    learned = learn(sheet, model, example)
    whole, half = (
        sheet.add("SolidMask", title=title, width=240, value=value, widgets={"width": wide, "height": 64})
        for title, value, wide in (("Nothing", 0.0, 64), ("A half", 1.0, 32))
    )
    right = sheet.add(
        "MaskComposite", title="Right half", width=240, destination=whole, source=half, x=32, y=0, operation="add"
    )
    left = sheet.add("InvertMask", title="Left half", width=240, mask=right)
    both = sheet.add(
        "BatchMasksNode", title="Right for rex, left for doll", width=240, masks__mask0=right, masks__mask1=left
    )
    applied = apply(sheet, model, learned, masks=both)
    new = draw(sheet, applied, applied["CLIP"], model["VAE"], "a photo of <rex> and <doll> on grass", "layout")
    sheet.arrange(
        row(
            column(note, group("1  Picture and prompt", column(model, picture, example))),
            group("2  Learn", learned),
            column(group("3  Where", column(whole, half, right, left, both)), prompt),
            group("4  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def em_beside_fixed(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "06 Updated masks beside fixed masks",
        "Learns the same picture twice, with masks that are updated (EM) and masks that stay, and compares.",
    )
    note = sheet.note(
        "The objects of this scene have no name of their own, so the first masks are rough. On the left the masks are "
        "found again and again while the words are learned (*find and improve*); on the right they stay as they were first found "
        "(*find once*). The curves show the masks' agreement with the true ones (IoU) step by step.\n\nThe true masks are "
        "only compared with. On easy pictures both ways end alike.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "C", 3)
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add(
        "ConceptExample", width=272, image=picture["IMAGE"], prompt=picture["prompt"], masks=picture["MASK"],
    )  # fmt: skip
    ways = (("find and improve", "Improved while learning (EM)"), ("find once", "Found once"))
    learned = [learn(sheet, model, example, mode=mode) for mode, _ in ways]
    lanes = [group(title, run) for run, (_, title) in zip(learned, ways, strict=True)]
    results = []
    for run, (_, title) in zip(learned, ways, strict=True):
        curves = show(sheet, run["curves"], f"Curves: {title}", (390, 330))
        compared = sheet.add(
            "CompareConceptMasks", title=title, width=220, mask=run["masks"], reference=picture["MASK"]
        )
        numbers = read(sheet, compared["text"], "Overlap with the true masks (IoU)", 220)
        results.append(row(curves, column(compared, numbers)))
    sheet.arrange(
        row(
            column(note, group("Picture and prompt", column(model, picture, example))),
            column(row(*lanes), prompt),
            group("Which masks are better?", column(*results)),
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
        "*Discover Concepts* counts the things in a picture without being told what they are, and gives each a mask "
        "and a name: `<concept1>`, `<concept2>`, ... from left to right. Its *examples* go straight to *Learn "
        "Concepts*; *given* learns under the masks that were found.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "E", 4)
    seen = show(sheet, picture["IMAGE"], "The picture", (240, 246))
    found = sheet.add(
        "DiscoverConcepts", width=300, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"], image=picture["IMAGE"],
    )  # fmt: skip
    prompt = read(sheet, found["prompt"], "The prompt that it wrote", 300)
    masks = show_masks(sheet, found["masks"], "What it found", (300, 280))
    learned = learn(sheet, model, found["examples"], mode="given")
    applied = apply(sheet, model, learned)
    new = draw(sheet, applied, applied["CLIP"], model["VAE"], "a photo of <concept1> on sand", "discovered")
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Discover", column(found, masks, prompt)),
            group("3  Learn", learned),
            group("4  Draw one of them", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def visual_condition(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "08 Look at the picture while drawing",
        "Learns small blocks that look at the concepts' pictures while drawing (a visual condition).",
    )
    note = sheet.note(
        "For details that a word cannot carry: *Learn Visual Condition* learns a word and a mask for each object, and "
        "small blocks that look at the object's picture while the model draws. *Apply Visual Condition* lets them act; "
        "*strength* 0 is the words alone.\n\n**Your own picture:** as in the first workflow, with 400 steps.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "B", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (240, 246))
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add("ConceptExample", width=320, image=picture["IMAGE"], prompt=picture["prompt"])
    learned = sheet.add(
        "LearnVisualCondition", width=320, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"], examples=example,
        steps=200,
    )  # fmt: skip
    curves = show(sheet, learned["curves"], "Curves", (320, 250))
    saved = sheet.add("SaveVisualCondition", width=300, condition=learned, name="demo_condition", overwrite=True)
    applied = sheet.add("ApplyVisualCondition", width=300, model=model["MODEL"], clip=model["CLIP"], condition=learned)
    new = draw(sheet, applied, applied["CLIP"], model["VAE"], "a photo of <rex> and <doll> on sand", "visual_condition")
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Learn", column(example, prompt, curves, saved), learned),
            group("3  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


DEMO = (
    two_together, other_background, text_to_mask, refine_any_mask, layout, em_beside_fixed, discover,
    visual_condition,
)  # fmt: skip
