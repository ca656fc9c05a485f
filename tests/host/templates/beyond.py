"""The workflows for checkpoints that go beyond this pack's own drawing: other trainers, files, measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from templates.boxes import column, group, row
from templates.checkpoints import NEEDS, draw_with, photo
from templates.editor import Sheet
from templates.masked import find, square
from templates.parts import SD15, SDXL, Family, checkpoint, read, show, show_masks

Info = Mapping[str, Any]
VISION = {
    "name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "url": "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
    "directory": "clip_vision",
}


def train_lora(info: Info) -> Sheet:
    family = SDXL
    sheet = Sheet(
        info,
        "17 Train LoRA (SDXL, v0.33.0)",
        "Trains a LoRA with ComfyUI's own node inside the mask of your subject alone.",
    )
    note = sheet.note(
        "*Train LoRA* sees the subject only: *Mask Training Conditioning* tells it which part of the picture "
        "counts, for every family of models that it trains. Keep *batch_size* at 1 "
        "(*grad_accumulation_steps* does the same), and bf16 or fp32. *Save Training Set* writes the same "
        "for other trainers.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <rex:dog> on <grass:grass>", "rex")
    seen = show_masks(sheet, mask["mask"], "Only this is learned", (320, 240))
    latent = sheet.add("VAEEncode", width=300, pixels=sized, vae=loaded["VAE"])
    caption = sheet.add(
        "CLIPTextEncode", title="Caption", clip=loaded["CLIP"], text="a photo of ohwx dog on grass"
    )
    masked = sheet.add(
        "MaskTrainingConditioning",
        width=300,
        conditioning=caption,
        masks=mask["mask"],
        latents=latent,
    )
    trained = sheet.add(
        "TrainLoraNode",
        width=320,
        model=loaded["MODEL"],
        latents=latent,
        positive=masked,
        steps=500,
        rank=16,
    )
    saved = sheet.add(
        "SaveLoRA",
        width=300,
        lora=trained["lora"],
        prefix="loras/my_subject",
        steps=trained["steps"],
    )
    losses = sheet.add(
        "LossGraphNode", width=300, height=240, loss=trained["loss_map"], filename_prefix="loss"
    )
    others = sheet.add(
        "SaveConceptTrainingSet", width=300, examples=found["examples"], layout="sd-scripts (masks)",
        name="my_set", words="rex: ohwx dog",
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture, sized))),
            group("2  Mask", column(found, mask)),
            group("3  Caption and mask", column(latent, caption, masked, others)),
            group("4  Train", column(seen, trained), column(saved, losses)),
        )
    )
    return sheet


def stock_only(family: Family, info: Info) -> Sheet:
    sheet = Sheet(
        info,
        f"18 Stock nodes only ({family.title})",
        "Draws a saved concept without any node of this pack: one LoRA and a plain trigger word.",
    )
    note = sheet.note(
        "*Save Concepts* wrote `models/loras/my_concepts.safetensors` (run *Learn and save* first) and said "
        "which plain word calls which concept: here `sks`. **Both strengths matter:** the tokens are in the "
        "CLIP half, so a loader for the model alone drops them. Strength 0 gives back what `sks` means to "
        "the checkpoint itself.",
    )
    loaded = checkpoint(sheet, family)
    lora = sheet.add(
        "LoraLoader", width=300, model=loaded["MODEL"], clip=loaded["CLIP"], lora_name="my_concepts.safetensors",
        strength_model=1.0, strength_clip=1.0,
    )  # fmt: skip
    new = draw_with(
        sheet, lora, loaded, family, "a photo of sks on a beach", "stock", picture=(460, 460)
    )
    sheet.arrange(
        row(
            column(note, group("1  Model and LoRA", column(loaded, lora))),
            group("2  Prompt", new.text()),
            group("3  Draw", column(new.sampler, new.decoded), new.picture),
        )
    )
    return sheet


def measure(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "19 Measure (SD 1.5)",
        "Draws prompts with saved concepts and measures how well they are followed and how alike they look.",
    )
    note = sheet.note(
        f"{NEEDS} Give the picture and prompt that were learned from, so that likeness can be measured. One "
        "prompt a line. docs/evaluate.md says what each number means, and which other measures there are.",
    )
    loaded = checkpoint(sheet, family)
    concepts = sheet.add("LoadConcepts", width=300, name="my_concepts.safetensors")
    picture = photo(sheet, "The picture that was learned from", 310)
    example = sheet.add(
        "ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>"
    )
    vision = sheet.add("CLIPVisionLoader", width=320, models=(VISION,), clip_name=VISION["name"])
    measured = sheet.add(
        "EvaluateConcepts", width=340, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
        concepts=concepts,
        prompts="a photo of <rex> in the snow\na photo of <rex> on a sofa", examples=example, clip_vision=vision,
    )  # fmt: skip
    table = read(sheet, measured["text"], "The measures", 420, 260)
    best = show(sheet, measured["sheet"], "The best and the worst", (420, 420))
    sheet.arrange(
        row(
            column(note, group("1  Model and concepts", column(loaded, concepts))),
            group("2  What was learned from", column(picture, example, vision)),
            group("3  Draw and measure", measured, column(table, best)),
        )
    )
    return sheet


def saved_condition(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "20 Visual condition (SD 1.5)",
        "Learns blocks that look at your picture while drawing and saves them; draws with a saved file.",
    )
    note = sheet.note(
        "*Learn and save* writes `my_condition`, *Load and draw* uses a saved file. The first time, mute the "
        "last group (Ctrl+M), run, press R so that the file is known, and unmute it; mute the second group "
        "when you only draw.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    example = sheet.add(
        "ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>"
    )
    learned = sheet.add(
        "LearnVisualCondition", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
        examples=example,
    )  # fmt: skip
    saved = sheet.add(
        "SaveVisualCondition", width=300, condition=learned, name="my_condition", overwrite=True
    )
    opened = sheet.add("LoadVisualCondition", width=300, name="my_condition.safetensors")
    applied = sheet.add(
        "ApplyVisualCondition",
        width=300,
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        condition=opened,
    )
    new = draw_with(
        sheet,
        applied,
        loaded,
        family,
        "a photo of <rex> in the snow",
        "visual_condition",
        picture=(300, 330),
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture))),
            group("2  Learn and save", column(example, saved), learned),
            group("3  Load and draw", column(opened, applied, new.text()), new.drawn()),
        )
    )
    return sheet


BEYOND: tuple[Callable[[Info], Sheet], ...] = (
    train_lora, partial(stock_only, SD15), partial(stock_only, SDXL), measure, saved_condition,
)  # fmt: skip
