"""The workflows for checkpoints in which masks do the work: inpainting, SAM 3, discovery."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from templates.boxes import column, group, row
from templates.checkpoints import NEEDS, draw_with, learn_from, photo, saved_concepts
from templates.editor import Placed, Sheet
from templates.parts import SD15, SDXL, checkpoint, file, read, show_masks

Info = Mapping[str, Any]
SAM = file("sam3.1_multiplex_fp16.safetensors", "Comfy-Org/sam3.1", "checkpoints", "checkpoints/")


def square(sheet: Sheet, picture: Placed, side: int) -> Placed:
    """A picture at the size that a family draws in."""
    return sheet.add(
        "ImageScale", title=f"To {side} x {side}", width=300, image=picture, upscale_method="lanczos",
        crop="center",
        widgets={"width": side, "height": side},
    )  # fmt: skip


def find(
    sheet: Sheet, loaded: Placed, picture: Placed, prompt: str, name: str
) -> tuple[Placed, Placed]:
    """Extract Latent Masks, and the mask of one name."""
    found = sheet.add(
        "ExtractLatentMasks", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
        image=picture,
        prompt=prompt,
    )  # fmt: skip
    return found, sheet.add("ConceptMaskByName", width=280, examples=found["examples"], names=name)


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
        "13 Inpaint by text (SDXL)",
        "Finds a thing in your picture by its name and draws something else in its place.",
    )
    note = sheet.note(
        "Name what is in the picture, the background too: `a photo of <cat:cat> on <sofa:sofa>`. *Concept "
        "Mask by Name* gives the mask of one of the names, and only there the picture is drawn anew. Nothing "
        "is learned here. Use an ordinary checkpoint, not an inpainting one.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <cat:cat> on <sofa:sofa>", "cat")
    seen = show_masks(sheet, mask["mask"], "The mask", (280, 280))
    again = masked_latent(sheet, sized, mask["mask"], loaded)
    new = draw_with(
        sheet, loaded, loaded, family, "a photo of a fox on a sofa", "inpainted", picture=(340, 360),
        latent=again[-1],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture, sized))),
            group("2  Find", found, column(mask, seen)),
            group("3  Prompt", column(new.prompt, new.negative, *again)),
            group("4  Draw", new.drawn()),
        )
    )
    return sheet


def into_another(info: Info) -> Sheet:
    family = SD15
    sheet = Sheet(
        info,
        "14 Subject into a picture (SD 1.5)",
        "Puts a learned subject, with its LoRA, in the place of something in another picture.",
    )
    note = sheet.note(
        f"{NEEDS} Its LoRA, if it was learned with one, acts too. The prompt in *Extract Latent Masks* "
        "describes the other picture and names what is to be replaced, here `<dog:dog>`. Grow the mask if "
        "the subject is of another shape.",
    )
    loaded = checkpoint(sheet, family)
    concepts, applied = saved_concepts(sheet, loaded)
    picture = photo(sheet, "The other picture", 310)
    sized = square(sheet, picture, family.side)
    found, mask = find(sheet, loaded, sized, "a photo of <dog:dog> on <grass:grass>", "dog")
    seen = show_masks(sheet, mask["mask"], "Where the subject goes", (300, 260))
    again = masked_latent(sheet, sized, mask["mask"], loaded, 16)
    new = draw_with(
        sheet, applied, loaded, family, "a photo of <rex> on grass", "into_another", picture=(300, 330),
        latent=again[-1],
    )  # fmt: skip
    sheet.arrange(
        row(
            column(note, group("1  Model and subject", column(loaded, concepts, applied))),
            group(
                "2  Find the place in the other picture",
                column(picture, sized, seen),
                column(found, mask),
            ),
            group("3  Prompt", column(new.prompt, new.negative, *again)),
            group("4  Draw", new.drawn()),
        )
    )
    return sheet


def with_sam(info: Info) -> Sheet:
    family = SDXL
    sheet = Sheet(
        info,
        "15 SAM 3 masks (SDXL, v0.33.0)",
        "Learns two concepts under masks that SAM 3 finds by their names.",
    )
    note = sheet.note(
        "SAM 3 finds things that have a name, with clean edges. One mask for each concept, in the order of "
        "the prompt: *masks* of *Learn Concepts* is on *given*, so nothing is searched. Use *Learn and save* "
        "where a thing has no name.",
    )
    sam = sheet.add(
        "CheckpointLoaderSimple",
        title="Load SAM 3",
        width=300,
        models=(SAM,),
        ckpt_name=SAM["name"],
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    masks = []
    for word in ("dog", "beach"):
        text = sheet.add(
            "CLIPTextEncode", title=f"SAM 3: {word}", height=90, clip=sam["CLIP"], text=word
        )
        masks.append(
            sheet.add(
                "SAM3_Detect", width=300, model=sam["MODEL"], image=picture, conditioning=text
            )
        )
    texts = [sheet.nodes[-4], sheet.nodes[-2]]
    both = sheet.add(
        "BatchMasksNode", title="Masks in the prompt's order", width=300, masks__mask0=masks[0]["masks"],
        masks__mask1=masks[1]["masks"],
    )  # fmt: skip
    seen = show_masks(sheet, both, "Masks", (300, 240))
    example = sheet.add(
        "ConceptExample",
        width=320,
        image=picture,
        prompt="a photo of <rex:dog> on <shore:beach>",
        masks=both,
    )
    learned = learn_from(sheet, loaded, example, mode="given")
    saved = sheet.add(
        "SaveConcepts", width=320, concepts=learned, name="my_concepts", overwrite=True, exports=True,
        clip=loaded["CLIP"],
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
        "16 Discover and draw (SD 1.5)",
        "Finds the things in your picture without a word about them, learns them and draws one elsewhere.",
    )
    note = sheet.note(
        "*Discover Concepts* names the things `<concept1>`, `<concept2>`, ... from left to right; the text "
        "says which there are. Lower *at most* if it finds small things that you do not want. Then write one "
        "of the names into the prompt.",
    )
    loaded = checkpoint(sheet, family)
    picture = photo(sheet, height=310)
    found = sheet.add(
        "DiscoverConcepts", width=320, model=loaded["MODEL"], clip=loaded["CLIP"], vae=loaded["VAE"],
        image=picture,
    )  # fmt: skip
    prompt = read(sheet, found["prompt"], "The prompt that it wrote", 320)
    masks = show_masks(sheet, found["masks"], "What it found", (320, 280))
    learned = learn_from(sheet, loaded, found["examples"], mode="given", joint="LoRA")
    applied = sheet.add(
        "ApplyConceptTokens",
        model=loaded["MODEL"],
        clip=loaded["CLIP"],
        concepts=learned["concepts"],
    )
    new = draw_with(
        sheet,
        applied,
        loaded,
        family,
        "a photo of <concept1> in the snow",
        "discovered",
        picture=(300, 320),
    )
    sheet.arrange(
        row(
            column(note, group("1  Picture and model", column(loaded, picture))),
            group("2  Discover", column(found, masks)),
            group("3  Learn", column(learned, prompt)),
            group("4  Draw one of them", column(applied, new.text()), new.drawn()),
        )
    )
    return sheet


MASKED: tuple[Callable[[Info], Sheet], ...] = (inpaint, into_another, with_sam, what_is_in)
