"""The workflows that run on the demo model and draw, on any computer and without a download."""

from __future__ import annotations

from templates.boxes import column, group, row
from templates.demo_masks import (
    Info,
    apply,
    discover,
    em_beside_fixed,
    learn,
    refine_any_mask,
    scene,
    text_to_mask,
)
from templates.editor import Sheet
from templates.parts import draw, read, show


def two_together(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "01 Learn two concepts",
        "Learns two objects and their masks from one picture, then draws both in a new place.",
    )
    note = sheet.note(
        "Press **Run**. *Demo Scene* shows two objects that the model has never seen; *Learn Concepts* "
        "learns a word and a mask for each. Behind *Apply Concept Tokens*, `<rex>` and `<doll>` work in any "
        "prompt.\n\n**Your own picture:** *Load Checkpoint* and *Load Image* in place of the demo nodes, a "
        "prompt such as `a photo of <rex:dog> on <shore:beach>`, 400 steps, and your model's picture size. "
        "Nothing is connected to *masks* of *Concept Example* then.",
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
    saved = sheet.add(
        "SaveConcepts", width=330, concepts=learned, name="demo_concepts", overwrite=True, exports=True,
        clip=model["CLIP"],
    )  # fmt: skip
    applied = apply(sheet, model, learned)
    new = draw(
        sheet,
        applied,
        applied["CLIP"],
        model["VAE"],
        "a photo of <rex> and <doll> on sand",
        "concepts",
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Learn and save", column(example, prompt, saved), learned),
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
        "02 Subject on a new background",
        "Learns the objects of one picture and the background of another, and draws them together.",
    )
    note = sheet.note(
        "Two *Concept Example* nodes in a row are learned together. The first picture brings `<rex>` and "
        "`<doll>`, the second its ground: a background is a concept like any other, here "
        "`<place:grass>`.\n\n**Your own pictures:** give each its prompt, and mark only what you want to learn.",
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
        "ConceptExample", title="Example of the subject", width=320, image=first["IMAGE"],
        prompt=first["prompt"],
    )  # fmt: skip
    ground = sheet.add(
        "ConceptExample", title="Example of the background", width=320, image=second["IMAGE"],
        prompt="a photo of <box:square> and <ball:circle> on <place:grass>", examples=subject,
    )  # fmt: skip
    learned = learn(sheet, model, ground)
    applied = apply(sheet, model, learned)
    new = draw(
        sheet,
        applied,
        applied["CLIP"],
        model["VAE"],
        "a photo of <rex> on <place>",
        "other_background",
    )
    sheet.arrange(
        row(
            column(note, group("1  Two pictures", column(model, first, second)), prompt),
            group("2  Their prompts", column(subject, ground, both, seen)),
            group("3  Learn from both", learned),
            group("4  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def layout(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "05 Lay out by masks",
        "Says where in the picture each learned concept goes.",
    )
    note = sheet.note(
        "*masks* on *Apply Concept Tokens* keep each concept in its part of the picture: one mask for each, "
        "in the order of the prompt. Here `<rex>` gets the right half and `<doll>` the left.\n\nPaint your "
        "own masks, or take them from *Extract Latent Masks* of any picture whose layout you like.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add(
        "ConceptExample", width=272, image=picture["IMAGE"], prompt=picture["prompt"]
    )
    learned = learn(sheet, model, example, joint="LoRA")
    whole, half = (
        sheet.add(
            "SolidMask", title=title, width=240, value=value, widgets={"width": wide, "height": 64}
        )
        for title, value, wide in (("Nothing", 0.0, 64), ("A half", 1.0, 32))
    )
    right = sheet.add(
        "MaskComposite",
        title="Right half",
        width=240,
        destination=whole,
        source=half,
        x=32,
        y=0,
        operation="add",
    )
    left = sheet.add("InvertMask", title="Left half", width=240, mask=right)
    both = sheet.add(
        "BatchMasksNode",
        title="Right for rex, left for doll",
        width=240,
        masks__mask0=right,
        masks__mask1=left,
    )
    applied = apply(sheet, model, learned, masks=both)
    new = draw(
        sheet,
        applied,
        applied["CLIP"],
        model["VAE"],
        "a photo of <rex> and <doll> on grass",
        "layout",
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and prompt", column(model, picture, example))),
            group("2  Learn", learned),
            column(group("3  Where", column(whole, half, right, left, both)), prompt),
            group("4  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def visual_condition(info: Info) -> Sheet:
    sheet = Sheet(
        info,
        "08 Visual condition",
        "Learns small blocks that look at the concepts' pictures while drawing (a visual condition).",
    )
    note = sheet.note(
        "For details that a word cannot carry: *Learn Visual Condition* learns a word and a mask for each "
        "object, and small blocks that look at the object's picture while the model draws. *Apply Visual "
        "Condition* lets them act; *strength* 0 is the words alone.\n\n**Your own picture:** as in the first "
        "workflow, with 400 steps.",
        width=272,
    )
    model = sheet.add("LoadConceptDemoModel", width=240)
    picture = scene(sheet, "A", 3)
    seen = show(sheet, picture["IMAGE"], "The picture", (240, 246))
    prompt = read(sheet, picture["prompt"], "The prompt in use")
    example = sheet.add(
        "ConceptExample", width=320, image=picture["IMAGE"], prompt=picture["prompt"]
    )
    learned = sheet.add(
        "LearnVisualCondition", width=320, model=model["MODEL"], clip=model["CLIP"], vae=model["VAE"],
        examples=example,
        steps=200,
    )  # fmt: skip
    saved = sheet.add(
        "SaveVisualCondition", width=300, condition=learned, name="demo_condition", overwrite=True
    )
    applied = sheet.add(
        "ApplyVisualCondition",
        width=300,
        model=model["MODEL"],
        clip=model["CLIP"],
        condition=learned,
    )
    new = draw(
        sheet,
        applied,
        applied["CLIP"],
        model["VAE"],
        "a photo of <rex> on grass",
        "visual_condition",
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(model, picture, seen))),
            group("2  Learn", column(example, prompt, saved), learned),
            group("3  Draw", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


DEMO = (
    two_together, other_background, text_to_mask, refine_any_mask, layout, em_beside_fixed, discover,
    visual_condition,
)  # fmt: skip
