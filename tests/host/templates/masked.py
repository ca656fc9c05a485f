"""The workflows for checkpoints in which masks do the work: inpainting, SAM 3, discovery, other trainers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from templates.boxes import column, group, row
from templates.checkpoints import NEEDS, draw_with, learn_from, photo, saved_concepts
from templates.editor import Placed, Sheet
from templates.parts import SD15, SDXL, Family, checkpoint, file, read, show, show_masks

Info = Mapping[str, Any]
SAM = file("sam3.1_multiplex_fp16.safetensors", "Comfy-Org/sam3.1", "checkpoints", "checkpoints/")
VISION = {
    "name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
    "url": "https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
    "directory": "clip_vision",
}


def square(sheet: Sheet, picture: Placed, side: int) -> Placed:
    """A picture at the size that a family draws in."""
    return sheet.add(
        "ImageScale", title=f"To {side} x {side}", width=300, image=picture, upscale_method="lanczos", crop="center",
        widgets={"width": side, "height": side},
    )  # fmt: skip


def find(sheet: Sheet, loaded: Placed, picture: Placed, prompt: str, name: str) -> tuple[Placed, Placed]:
    """Extract Latent Masks, and the mask of one name."""
    found = sheet.add(
        "ExtractLatentMasks", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"], image=picture,
        prompt=prompt,
    )  # fmt: skip
    return found, sheet.add("ConceptMaskByName", width=320, examples=found["examples"], names=name)


def masked_latent(
    sheet: Sheet, picture: Placed, mask: Any, loaded: Placed, grow: int = 8
) -> list[Placed]:
    """The nodes to a latent that is drawn anew inside a mask alone, which is grown a little first."""
    grown = sheet.add("GrowMask", width=300, mask=mask, expand=grow)
    encoded = sheet.add("VAEEncode", width=300, pixels=picture, vae=loaded["VAE"])
    return [grown, encoded, sheet.add("SetLatentNoiseMask", width=300, samples=encoded, mask=grown)]


def inpaint(info: Info) -> Sheet:
    family = SDXL
    sheet = Sheet(
        info,
        "13 Inpaint with an extracted mask (SDXL)",
        "Finds a thing in your picture by its name and draws something else in its place.",
    )
    note = sheet.note(
        "Name what is in the picture, the background too: `a photo of <cat:cat> on <sofa:sofa>`. *Concept Mask by "
        "Name* gives the mask of one of the names, and only there the picture is drawn anew. Nothing is learned here. "
        "Use an ordinary checkpoint, not an inpainting one.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <cat:cat> on <sofa:sofa>", "cat")
    seen = show_masks(sheet, mask["mask"], "The mask", (320, 260))
    again = masked_latent(sheet, sized, mask["mask"], loaded)
    new = draw_with(
        sheet, loaded, loaded, family, "a photo of a fox on a sofa", "inpainted", picture=(340, 360), latent=again[-1],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture, sized))),
            group("2  Find", column(found, mask, seen)),
            group("3  Prompt", column(new.prompt, new.negative, *again)),
            group("4  Draw", new.drawn()),
        )
    )
    return sheet


def into_another(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "14 One subject into another picture (SD 1.5)",
        "Puts a learned subject, with its LoRA, in the place of something in another picture.",
    )
    note = sheet.note(
        f"{NEEDS} Its LoRA, if it was learned with one, acts too. The prompt in *Extract Latent Masks* describes the "
        "other picture and names what is to be replaced, here `<dog:dog>`. Grow the mask if the subject is of another "
        "shape.",
    )
    loaded = checkpoint(sheet, family)
    concepts, applied = saved_concepts(sheet, loaded)
    picture = photo(sheet, "The other picture", 310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <dog:dog> on <grass:grass>", "dog")
    seen = show_masks(sheet, mask["mask"], "Where the subject goes", (300, 260))
    again = masked_latent(sheet, sized, mask["mask"], loaded, 16)
    new = draw_with(
        sheet, applied, loaded, family, "a photo of <rex> on grass", "into_another", picture=(300, 330), latent=again[-1],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Model and subject", column(loaded, concepts, applied))),
            group("2  Find the place in the other picture", column(picture, sized, seen), column(found, mask)),
            group("3  Prompt", column(new.prompt, new.negative, *again)),
            group("4  Draw", new.drawn()),
        )
    )
    return sheet


def with_sam(info: Info) -> Sheet:
    family = SDXL
    sheet = Sheet(
        info,
        "15 SAM 3 masks, then learn (SDXL, ComfyUI v0.33.0 and newer)",
        "Learns two concepts under masks that SAM 3 finds by their names.",
    )
    note = sheet.note(
        "SAM 3 finds things that have a name, with clean edges. One mask for each concept, in the order of the prompt: "
        "*masks* of *Learn Concepts* is on *given*, so nothing is searched. Use *Learn and save* where a thing has no "
        "name.",
    )
    sam = sheet.add("CheckpointLoaderSimple", title="Load SAM 3", width=300, models=(SAM,), ckpt_name=SAM["name"])
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    masks = []
    for word in ("dog", "beach"):
        text = sheet.add("CLIPTextEncode", title=f"SAM 3: {word}", height=90, clip=sam["CLIP"], text=word)
        masks.append(
            sheet.add("SAM3_Detect", width=300, model=sam["MODEL"], image=picture, conditioning=text)
        )
    texts = [sheet.nodes[-4], sheet.nodes[-2]]
    both = sheet.add(
        "BatchMasksNode", title="Masks in the prompt's order", width=300, masks__mask0=masks[0]["masks"],
        masks__mask1=masks[1]["masks"],
    )  # fmt: skip
    seen = show_masks(sheet, both, "Masks", (300, 240))
    example = sheet.add(
        "ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>", masks=both
    )
    learned = learn_from(sheet, loaded, example, mode="given")
    saved = sheet.add(
        "SaveConcepts", width=320, concepts=learned, name="my_concepts", overwrite=True, exports=True, clip=loaded["CLIP"],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and models", column(picture, sam, loaded))),
            group("2  SAM 3", column(texts[0], masks[0], texts[1], masks[1]), column(both, seen)),
            group("3  Learn", column(example, saved), learned),
        )
    )
    return sheet


def what_is_in(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "16 What is in this picture, draw one thing elsewhere (SD 1.5)",
        "Finds the things in your picture without a word about them, learns them and draws one elsewhere.",
    )
    note = sheet.note(
        "*Discover Concepts* names the things `<concept1>`, `<concept2>`, ... from left to right; the text says which "
        "there are. Lower *at most* if it finds small things that you do not want. Then write one of the names into the "
        "prompt.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    found = sheet.add(
        "DiscoverConcepts", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"], image=picture,
    )  # fmt: skip
    prompt = read(sheet, found["prompt"], "The prompt that it wrote", 320)
    masks = show_masks(sheet, found["masks"], "What it found", (320, 280))
    learned = learn_from(sheet, loaded, found["examples"], mode="given", joint="LoRA")
    applied = sheet.add(
        "ApplyConceptTokens", model=loaded["MODEL"], clip=loaded["CLIP"], concepts=learned["concepts"]
    )
    new = draw_with(sheet, applied, loaded, family, "a photo of <concept1> in the snow", "discovered", picture=(300, 320))
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture))),
            group("2  Discover", column(found, masks, prompt)),
            group("3  Learn", learned),
            group("4  Draw one of them", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


def train_lora(info: Info) -> Sheet:
    family = SDXL
    sheet = Sheet(
        info,
        "17 Masks for Train LoRA (SDXL, ComfyUI v0.33.0 and newer)",
        "Trains a LoRA with ComfyUI's own node inside the mask of your subject alone.",
    )
    note = sheet.note(
        "*Train LoRA* sees the subject only: *Mask Training Conditioning* tells it which part of the picture counts, for "
        "every family of models that it trains. Keep *batch_size* at 1 (*grad_accumulation_steps* does the same), and "
        "bf16 or fp32. *Save Training Set* writes the same for other trainers.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <rex:dog> on <grass:grass>", "rex")
    seen = show_masks(sheet, mask["mask"], "Only this is learned", (320, 240))
    latent = sheet.add("VAEEncode", width=300, pixels=sized, vae=loaded["VAE"])
    caption = sheet.add("CLIPTextEncode", title="Caption", clip=loaded["CLIP"], text="a photo of ohwx dog on grass")
    masked = sheet.add("MaskTrainingConditioning", width=300, conditioning=caption, masks=mask["mask"], latents=latent)
    trained = sheet.add("TrainLoraNode", width=320, model=loaded["MODEL"], latents=latent, positive=masked, steps=500, rank=16)
    saved = sheet.add("SaveLoRA", width=300, lora=trained["lora"], prefix="loras/my_subject", steps=trained["steps"])
    losses = sheet.add("LossGraphNode", width=300, height=240, loss=trained["loss_map"], filename_prefix="loss")
    others = sheet.add(
        "SaveConceptTrainingSet", width=300, examples=found["examples"], layout="sd-scripts (masks)", name="my_set", words="rex: ohwx dog",
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture, sized))),
            group("2  Mask", column(found, mask, seen)),
            group("3  Caption and mask", column(latent, caption, masked, others)),
            group("4  Train", trained, column(saved, losses)),
        )
    )
    return sheet


def stock_only(family: Family, info: Info) -> Sheet:
    sheet = Sheet(
        info,
        f"18 The LoRA file with stock nodes only ({family.title})",
        "Draws a saved concept without any node of this pack: one LoRA and a plain trigger word.",
    )
    note = sheet.note(
        "*Save Concepts* wrote `models/loras/my_concepts.safetensors` (run *Learn and save* first) and said which plain word "
        "calls which concept: here `sks`. **Both strengths matter:** the tokens are in the CLIP half, so a loader for the "
        "model alone drops them. Strength 0 gives back what `sks` means to the checkpoint itself.",
    )
    loaded = checkpoint(sheet, family)
    lora = sheet.add(
        "LoraLoader", width=300, model=loaded["MODEL"], clip=loaded["CLIP"], lora_name="my_concepts.safetensors",
        strength_model=1.0, strength_clip=1.0,
    )  # fmt: skip
    new = draw_with(sheet, lora, loaded, family, "a photo of sks on a beach", "stock", picture=(460, 460))
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
        "19 Measure what was learned (SD 1.5)",
        "Draws prompts with saved concepts and measures how well they are followed and how alike they look.",
    )
    note = sheet.note(
        f"{NEEDS} Give the picture and prompt that were learned from, so that likeness can be measured. One prompt a line. "
        "docs/evaluate.md says what each number means, and which other measures there are.",
    )
    loaded = checkpoint(sheet, family)
    concepts = sheet.add("LoadConcepts", width=300, name="my_concepts.safetensors")
    picture = photo(sheet, "The picture that was learned from", 310)
    example = sheet.add("ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>")
    vision = sheet.add("CLIPVisionLoader", width=320, models=(VISION,), clip_name=VISION["name"])
    measured = sheet.add(
        "EvaluateConcepts", width=340, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"], concepts=concepts,
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
        "20 Learn a visual condition, and draw with a saved one (SD 1.5)",
        "Learns blocks that look at your picture while drawing and saves them; draws with a saved file.",
    )
    note = sheet.note(
        "*Learn and save* writes `my_condition`, *Load and draw* uses a saved file. The first time, mute the last group "
        "(Ctrl+M), run, press R so that the file is known, and unmute it; mute the second group when you only draw.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    example = sheet.add("ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>")
    learned = sheet.add(
        "LearnVisualCondition", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"], examples=example,
    )  # fmt: skip
    saved = sheet.add("SaveVisualCondition", width=300, condition=learned, name="my_condition", overwrite=True)
    opened = sheet.add("LoadVisualCondition", width=300, name="my_condition.safetensors")
    applied = sheet.add(
        "ApplyVisualCondition", width=300, model=loaded["MODEL"], clip=loaded["CLIP"], condition=opened
    )
    new = draw_with(sheet, applied, loaded, family, "a photo of <rex> in the snow", "visual_condition", picture=(300, 330))
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture))),
            group("2  Learn and save", column(example, saved), learned),
            group("3  Load and draw", column(opened, applied, new.text()), new.drawn()),
        )
    )
    return sheet


MASKED: tuple[Callable[[Info], Sheet], ...] = (
    inpaint, into_another, with_sam, what_is_in, train_lora, partial(stock_only, SD15), partial(stock_only, SDXL),
    measure, saved_condition,
)  # fmt: skip
