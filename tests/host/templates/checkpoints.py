"""The workflows for checkpoints and pictures of one's own, SD 1.5 and SDXL: learn, save, load and draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from templates.boxes import column, group, row
from templates.editor import Placed, Sheet
from templates.parts import SD15, SDXL, Family, checkpoint, draw, file, show, show_masks

Info = Mapping[str, Any]
SAVED = "my_concepts.safetensors"
"""What the workflow that learns and saves writes, for those that load."""
CANNY = file(
    "control_v11p_sd15_canny_fp16.safetensors",
    "comfyanonymous/ControlNet-v1-1_fp16_safetensors",
    "controlnet",
)
UPSCALER = file(
    "RealESRGAN_x4plus.safetensors", "Comfy-Org/Real-ESRGAN_repackaged", "upscale_models"
)
NEEDS = "Run *Learn and save* first, or choose another file in *Load Concepts*."


def photo(sheet: Sheet, title: str = "Your picture", height: int = 320) -> Placed:
    return sheet.add("LoadImage", title=title, width=300, height=height, image="example.png")


def learn_from(sheet: Sheet, loaded: Placed, examples: Any, **changes: Any) -> Placed:
    """Learn Concepts with what suits photographs."""
    values = {"mode": "find and improve", "steps": 400, "joint": "nothing"} | changes
    return sheet.add(
        "LearnConcepts", model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"], examples=examples,
        **values,
    )  # fmt: skip


def saved_concepts(sheet: Sheet, loaded: Placed, **more: Any) -> tuple[Placed, Placed]:
    """Load Concepts, and Apply Concept Tokens behind a checkpoint."""
    concepts = sheet.add("LoadConcepts", width=300, name=SAVED)
    applied = sheet.add(
        "ApplyConceptTokens", model=loaded["MODEL"], clip=loaded["CLIP"], concepts=concepts, **more
    )
    return concepts, applied


def draw_with(
    sheet: Sheet, applied: Placed, loaded: Placed, family: Family, text: str, name: str, **more: Any
) -> Any:
    """Prompts, sampler and pictures of the family's size."""
    return draw(
        sheet, applied["MODEL"], applied["CLIP"], loaded["VAE"], text, name, side=family.side, batch=1,
        cfg=family.cfg,
        enlarge=1, **more,
    )  # fmt: skip


def learn_and_save(family: Family, info: Info) -> Sheet:
    sheet = Sheet(
        info,
        f"09 Learn and save ({family.title})",
        "Learns what the prompt marks in your picture, and saves it for other workflows and programs.",
    )
    note = sheet.note(
        "1. Choose your picture, and describe it in *Concept Example*: `<rex:dog>` marks a thing to learn, "
        "called rex, that looks like a dog at first. Mark the background too.\n2. **Run.** The masks appear "
        "while it learns; no need to paint any. 400 steps take minutes on a graphics card.\n3. *Save "
        "Concepts* says which file goes where, and what to write. `my_concepts` is what the other workflows "
        "load.",
    )  # fmt: skip
    loaded = checkpoint(sheet, family)
    picture = photo(sheet)
    example = sheet.add(
        "ConceptExample", width=320, image=picture, prompt="a photo of <rex:dog> on <shore:beach>"
    )
    learned = learn_from(sheet, loaded, example, joint="LoRA")
    settings = sheet.add(
        "ConceptSettings", title="Concept Settings (may stay as they are)", width=372
    )
    learned.links["settings"] = settings["settings"]
    curves = show(sheet, learned["curves"], "Curves", (320, 250))
    masks = show_masks(sheet, learned["masks"], "Masks: rex, shore", (320, 260))
    saved = sheet.add(
        "SaveConcepts", width=340, concepts=learned, name="my_concepts", overwrite=True, exports=True,
        clip=loaded["CLIP"],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture))),
            group("2  Learn", column(example, masks, curves), learned),
            group("3  Save, and settings if you like", column(saved, settings)),
        )
    )
    return sheet


def load_and_draw(family: Family, info: Info) -> Sheet:
    sheet = Sheet(
        info,
        f"10 Load and draw ({family.title})",
        "Draws saved concepts with ordinary prompts.",
    )
    note = sheet.note(
        f"{NEEDS} Write `<rex>` like any word, also with a weight as in `(<rex>:1.2)`. *strength* 0 falls "
        "back to the words that the concept started from.",
    )
    loaded = checkpoint(sheet, family)
    concepts, applied = saved_concepts(sheet, loaded)
    new = draw_with(
        sheet,
        applied,
        loaded,
        family,
        "a photo of <rex> in the snow, mountains",
        "concepts",
        picture=(460, 460),
    )
    sheet.arrange(
        row(
            column(note, group("1  Model and concepts", column(loaded, concepts, applied))),
            group("2  Prompt", new.text()),
            group("3  Draw", column(new.sampler, new.decoded), new.picture),
        )
    )
    return sheet


def with_controlnet(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "11 ControlNet (SD 1.5)",
        "Draws saved concepts along the edges of another picture.",
    )
    note = sheet.note(
        f"{NEEDS} The lines of your picture (*Canny*) say where things go, `<rex>` says what is drawn there. "
        "Lower the ControlNet's *strength* if the concept looks forced into the lines.",
    )
    loaded = checkpoint(sheet, family)
    concepts, applied = saved_concepts(sheet, loaded)
    picture = photo(sheet, "Picture with the layout", 300)
    edges = sheet.add("Canny", width=300, image=picture, low_threshold=0.3, high_threshold=0.7)
    seen = show(sheet, edges, "Its edges", (300, 240))
    net = sheet.add("ControlNetLoader", width=300, models=(CANNY,), control_net_name=CANNY["name"])
    new = draw_with(
        sheet,
        applied,
        loaded,
        family,
        "a photo of <rex> in a garden",
        "controlnet",
        picture=(340, 340),
    )
    guided = sheet.add(
        "ControlNetApplyAdvanced", width=300, positive=new.prompt, negative=new.negative, control_net=net,
        image=edges,
        strength=0.8,
    )  # fmt: skip
    new.sampler.links |= {"positive": guided["positive"], "negative": guided["negative"]}
    sheet.arrange(
        row(
            column(note, group("1  Model and concepts", column(loaded, concepts, applied))),
            group("2  Layout", column(picture, edges, seen, net)),
            group("3  Prompt", column(new.text(), guided)),
            group("4  Draw", column(new.sampler, new.decoded, new.picture)),
        )
    )
    return sheet


def second_pass(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "12 Second pass, upscale (SD 1.5)",
        "Draws saved concepts, adds detail at one and a half times the size, and enlarges the result.",
    )
    note = sheet.note(
        f"{NEEDS} The second pass draws the enlarged latent again at half strength, with the concepts, so "
        "details stay those of `<rex>`. The upscale model then only enlarges.",
    )
    loaded = checkpoint(sheet, family)
    concepts, applied = saved_concepts(sheet, loaded)
    new = draw_with(
        sheet,
        applied,
        loaded,
        family,
        "a photo of <rex> on a sofa, detailed fur",
        "first_pass",
        picture=(300, 300),
    )
    larger = sheet.add(
        "LatentUpscaleBy", width=300, samples=new.sampler, upscale_method="bislerp", scale_by=1.5
    )
    again = sheet.add(
        "KSampler", title="Second pass", model=applied["MODEL"], positive=new.prompt, negative=new.negative,
        latent_image=larger, seed=1, steps=20, cfg=family.cfg, sampler_name="euler", scheduler="normal",
        denoise=0.5,
    )  # fmt: skip
    decoded = sheet.add("VAEDecode", samples=again, vae=loaded["VAE"])
    second = show(sheet, decoded, "Second pass", (300, 300))
    upscaler = sheet.add(
        "UpscaleModelLoader", width=320, models=(UPSCALER,), model_name=UPSCALER["name"]
    )
    enlarged = sheet.add("ImageUpscaleWithModel", width=320, upscale_model=upscaler, image=decoded)
    final = show(sheet, enlarged, "", (320, 340), save="upscaled")
    sheet.arrange(
        row(
            column(note, group("1  Model and concepts", column(loaded, concepts, applied))),
            group(
                "2  Prompt and first pass",
                column(
                    new.text(),
                ),
                column(new.sampler, new.decoded, new.picture),
            ),
            group("3  Second pass", column(larger, again, decoded, second)),
            group("4  Enlarge", column(upscaler, enlarged, final)),
        )
    )
    return sheet


CHECKPOINTS: tuple[Callable[[Info], Sheet], ...] = (
    partial(learn_and_save, SD15), partial(learn_and_save, SDXL), partial(load_and_draw, SD15),
    partial(load_and_draw, SDXL), with_controlnet, second_pass,
)  # fmt: skip
