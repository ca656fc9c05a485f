"""Pieces that several workflows have."""

from __future__ import annotations

from dataclasses import dataclass

from templates.boxes import Box, column
from templates.editor import Out, Placed, Sheet
from templates.sizes import LEAST_PREVIEW, LEAST_SAVED

Source = Placed | Out
HOST = "https://huggingface.co"


def file(name: str, repository: str, folder: str, within: str = "") -> dict[str, str]:
    """A model for the editor's dialog of missing models."""
    url = f"{HOST}/{repository}/resolve/main/{within}{name}"
    return {"name": name, "url": url, "directory": folder}


@dataclass(frozen=True)
class Family:
    """What a workflow needs to know of a family of checkpoints."""

    title: str
    checkpoint: dict[str, str]
    side: int
    cfg: float


SD15 = Family(
    "SD 1.5",
    file("v1-5-pruned-emaonly-fp16.safetensors", "Comfy-Org/stable-diffusion-v1-5-archive", "checkpoints"),
    512, 7.0,
)  # fmt: skip
SDXL = Family(
    "SDXL",
    file("sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0", "checkpoints"),
    1024, 6.0,
)  # fmt: skip


@dataclass
class Drawing:
    """The nodes that draw a prompt."""

    prompt: Placed
    negative: Placed
    latent: Placed
    """An empty one, or the one that was given."""
    sampler: Placed
    decoded: Placed
    scaled: Placed | None
    picture: Placed

    def text(self) -> Box:
        return column(self.prompt, self.negative, self.latent)

    def drawn(self) -> Box:
        """The picture above what makes it: the editor's map of the graph covers the lower right corner."""
        scaled = [] if self.scaled is None else [self.scaled]
        return column(self.picture, self.sampler, self.decoded, *scaled)


def draw(
    sheet: Sheet,
    model: Source,
    clip: Source,
    vae: Source,
    text: str,
    name: str,
    *,
    side: int = 128,
    batch: int = 4,
    cfg: float = 3.0,
    picture: tuple[int, int] = (300, 300),
    latent: Placed | None = None,
    enlarge: int = 4,
) -> Drawing:
    """Two prompts, an empty latent, a sampler, and the picture saved.

    The size, the guidance and the factor that pictures are enlarged by are the demo model's,
    which draws 64 x 64.
    """
    prompt = sheet.add("CLIPTextEncode", title="Prompt", clip=clip, text=text)
    negative = sheet.add("CLIPTextEncode", title="Negative prompt", height=90, clip=clip, text="")
    if latent is None:
        size = {"width": side, "height": side, "batch_size": batch}
        latent = sheet.add("EmptyLatentImage", width=300, widgets=size)
    sampler = sheet.add(
        "KSampler", model=model, positive=prompt, negative=negative, latent_image=latent, seed=1,
        steps=20, cfg=cfg, sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    decoded = sheet.add("VAEDecode", samples=sampler, vae=vae)
    scaled = None
    if enlarge > 1:
        scaled = sheet.add(
            "ImageScaleBy", title="Enlarge the small picture", width=300, image=decoded, scale_by=enlarge,
            upscale_method="nearest-exact",
        )  # fmt: skip
    shown = show(sheet, scaled or decoded, "", picture, save=name)
    return Drawing(prompt, negative, latent, sampler, decoded, scaled, shown)


def show(
    sheet: Sheet, image: Source, title: str, size: tuple[int, int] = (272, 246), save: str = ""
) -> Placed:
    """A picture on the canvas, and in the output folder if it has a name."""
    kind, more = ("SaveImage", {"filename_prefix": save}) if save else ("PreviewImage", {})
    height = max(size[1], LEAST_SAVED if save else LEAST_PREVIEW)
    return sheet.add(kind, title=title, width=size[0], height=height, images=image, **more)


def show_masks(
    sheet: Sheet, masks: Source, title: str, size: tuple[int, int] = (272, 246)
) -> Placed:
    """Masks on the canvas."""
    height = max(size[1], LEAST_PREVIEW)
    return sheet.add("MaskPreview", title=title, width=size[0], height=height, mask=masks)


def read(sheet: Sheet, text: Source, title: str, width: int = 272, height: int = 124) -> Placed:
    """A text on the canvas."""
    return sheet.add("PreviewAny", title=title, width=width, height=height, source=text)


def checkpoint(sheet: Sheet, family: Family) -> Placed:
    """Load Checkpoint, with the file's address for who does not have it."""
    of = family.checkpoint
    return sheet.add("CheckpointLoaderSimple", width=300, models=(of,), ckpt_name=of["name"])
