"""The node that draws pictures of learned concepts and measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management as mm
import folder_paths
from comfy_api.latest import io

from ..em_core.errors import UserError
from ..em_core.evaluate.contact import contact_sheet
from ..em_core.evaluate.encoders import CLIP_IMAGE, DINO, Instruments
from ..em_core.evaluate.evaluation import evaluate
from ..em_core.evaluate.perceptual import Lpips
from ..em_core.evaluate.pretrained import Clip
from ..em_core.evaluate.references import reference_crops
from ..em_core.evaluate.summary import summarise
from ..em_core.evaluate.tables import table
from ..em_core.evaluate.task import Task, read_prompts
from ..em_core.examples import Example
from ..em_core.runs.concept_set import ConceptSet
from .automatic import why_not
from .files import require_name, why_bad_name
from .host.application import require_same_family
from .host.comfy_host import ComfyHost
from .host.families import identify
from .host.text import known_names
from .host.vision import VisionEncoder
from .pictures import to_images
from .schema import ADVANCED, CATEGORY, Concepts, Examples, schema
from .studio import REPORTS, Studio, save
from .telling import on_node, told_on_node

ENCODERS = "visual_concepts_encoders"
NONE = "none"
EXAMPLE = "a photo of <rex> on a beach\na photo of <rex> and <doll> in the snow"
folder_paths.folder_names_and_paths.setdefault(
    ENCODERS, ([str(Path(folder_paths.models_dir) / ENCODERS)], {".safetensors"})
)


def encoder_folders() -> dict[str, Path]:
    """Return the folders of encoders in `models/visual_concepts_encoders`, by name."""
    parents = [Path(path) for path in folder_paths.get_folder_paths(ENCODERS)]
    found = [f for parent in parents if parent.is_dir() for f in sorted(parent.iterdir())]
    return {folder.name: folder for folder in reversed(found) if folder.is_dir()}


class EvaluateConcepts(io.ComfyNode):
    """Draw each prompt a few times and measure prompt agreement, identity, mixing and diversity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EvaluateConcepts",
            display_name="Evaluate Concepts",
            category=CATEGORY,
            search_aliases=["metrics", "clip score", "dino score", "lpips", "compare settings", "benchmark"],
            description="Draws pictures of learned concepts and measures them: do they follow the prompts, do they "
            "show the concepts, are concepts mixed, how much do they differ. Connect at least one encoder. "
            "docs/evaluate.md says what each number means.",
            is_output_node=True,
            inputs=[*main_inputs(), *encoder_inputs(), *advanced_inputs()],
            outputs=[
                io.String.Output(
                    "text", display_name="text", tooltip="The table of all measures, with 95% intervals."
                ),
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="The best and the worst pictures, with their values."
                ),
                io.Image.Output(
                    "pictures", display_name="pictures", tooltip="All pictures, prompt by prompt."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, prompts: Any = None, save_as: Any = None) -> bool | str:  # type: ignore[override]
        wrong = why_not(read_prompts, prompts) if isinstance(prompts, str) else ""
        if isinstance(save_as, str) and save_as.strip():
            wrong = wrong or why_bad_name(save_as)
        return wrong or True

    @classmethod
    def execute(  # type: ignore[override]
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        concepts: ConceptSet,
        prompts: str,
        count: int,
        seed: int,
        examples: tuple[Example, ...] = (),
        clip_vision: Any = None,
        dino: Any = None,
        text_clip: str = NONE,
        lpips: str = NONE,
        save_as: str = "",
        steps: int = 20,
        cfg: float = 5.0,
        passes: int = 20,
    ) -> io.NodeOutput:
        if save_as.strip():
            require_name(save_as)
        instruments = instruments_of(clip_vision, dino, text_clip, lpips)
        lines, seeds = read_prompts(prompts), tuple(range(seed, seed + count))
        host = ComfyHost(identify(model, clip, vae))
        require_same_family(concepts, clip)
        require_not_applied(clip, concepts)
        with told_on_node() as told:
            references = reference_crops(concepts, examples or (), host)
        task = Task(concepts, lines, seeds, instruments, references)
        studio = Studio(host, task, steps, cfg, passes)
        try:
            evaluation = evaluate(task, studio.draw, studio.find, studio.watch)
        finally:
            host.release()
        text = table(summarise([evaluation]))
        if save_as.strip():
            facts = {"sampling": f"{steps} steps, cfg {cfg:g}", "masks": f"{passes} noise samples"}
            text += f"\n\nThe report: {save(save_as, evaluation, studio, facts)}"
        sheet = contact_sheet(evaluation, studio.image)
        pictures = [studio.image(scores.prompt, scores.seed) for scores in evaluation.pictures]
        return io.NodeOutput(text, to_images([sheet]), to_images(pictures), ui=on_node(text, *told))


def main_inputs() -> list[Any]:
    """Return what is drawn, and what it is compared with."""
    return [
        io.Model.Input("model", tooltip="The model to draw with, without the concepts applied to it."),
        io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint as the MODEL."),
        io.Vae.Input("vae", tooltip="The VAE of the same checkpoint as the MODEL."),
        Concepts.Input(
            "concepts", tooltip="Learned concepts, from Learn Concepts or Load Concepts."
        ),
        io.String.Input(
            "prompts", multiline=True, default=EXAMPLE,
            tooltip="One prompt per line, each with at least one of the concepts as <name>. Lines that begin "
            "with # are left out.",
        ),
        io.Int.Input(
            "count", display_name="pictures per prompt", default=4, min=1, max=64,
            tooltip="Pictures per prompt. Diversity needs at least two.",
        ),
        io.Int.Input(
            "seed", display_name="first seed", default=0, min=0, max=2**31 - 1, control_after_generate=False,
            tooltip="Seed of each prompt's first picture; each further one adds 1.",
        ),
        Examples.Input(
            "examples", optional=True,
            tooltip="The examples that the concepts were learned from, to compare with. Without them neither "
            "identity nor mixing is measured.",
        ),
    ]  # fmt: skip


def encoder_inputs() -> list[Any]:
    """Return what is measured with."""
    folder = f"in models/{ENCODERS}"
    names = [NONE, *encoder_folders()]
    return [
        io.ClipVision.Input(
            "clip_vision", display_name="CLIP vision model", optional=True,
            tooltip="CLIP's vision model, from Load CLIP Vision: identity.",
        ),
        io.ClipVision.Input(
            "dino", display_name="DINOv2", optional=True,
            tooltip="DINOv2, from Load CLIP Vision: identity, mixing, and diversity without LPIPS. It tells "
            "individuals apart better than CLIP.",
        ),
        io.Combo.Input(
            "text_clip", display_name="CLIP for prompts (folder)", options=names, default=NONE, optional=True,
            tooltip=f"A folder {folder} with a whole CLIP model as transformers saves it: agreement with the "
            "prompts, and identity if no CLIP_VISION is connected.",
        ),
        io.Combo.Input(
            "lpips", display_name="LPIPS backbone (folder)", options=names, default=NONE, optional=True,
            tooltip=f"A folder {folder} with the .safetensors file of VGG16 or AlexNet, named as in torchvision: "
            "diversity by LPIPS. Needs torchmetrics (pip install torchmetrics).",
        ),
        io.String.Input(
            "save_as", display_name="save report as", default="", optional=True,
            tooltip=f"Writes the report (HTML and CSV) and the pictures to a new folder of this name in "
            f"output/{REPORTS}. Letters, digits, '_' and '-'. Empty saves nothing.",
        ),
    ]  # fmt: skip


def advanced_inputs() -> list[Any]:
    """Return how pictures are drawn and searched."""
    return [
        io.Int.Input(
            "steps", display_name="sampling steps", default=20, min=1, max=1000, optional=True,
            tooltip="Sampling steps (Euler, normal schedule).", **ADVANCED,
        ),
        io.Float.Input(
            "cfg", default=5.0, min=0.0, max=100.0, step=0.1, optional=True,
            tooltip="Scale of classifier-free guidance.", **ADVANCED,
        ),
        io.Int.Input(
            "passes", display_name="passes (noise samples)", default=20, min=1, max=200, optional=True,
            tooltip="How many noisy versions of a picture are averaged to find the concepts in it.", **ADVANCED,
        ),
    ]  # fmt: skip


def instruments_of(clip_vision: Any, dino: Any, text_clip: str, lpips: str) -> Instruments:
    """Return the encoders that are connected or named.

    Raises:
        UserError: there is none, or one cannot be loaded.
    """
    device, folders = mm.get_torch_device(), encoder_folders()

    def folder(name: str) -> Path:
        if name not in folders:
            raise UserError(f"No folder {name!r} in models/{ENCODERS}. Choose one that is there.")
        return folders[name]

    clip = None if text_clip == NONE else Clip.load(folder(text_clip), device)
    seeing = clip if clip_vision is None else VisionEncoder(clip_vision)
    telling = None if dino is None else VisionEncoder(dino)
    looks = {name: of for name, of in ((CLIP_IMAGE, seeing), (DINO, telling)) if of is not None}
    distance = None if lpips == NONE else Lpips.load(folder(lpips), device)
    return Instruments(clip, looks, distance)


def require_not_applied(clip: Any, concepts: ConceptSet) -> None:
    """Refuse a CLIP that knows the concepts already: their weights would act on the MODEL twice.

    Raises:
        UserError: it knows them.
    """
    if known := known_names(clip.tokenizer, concepts.names):
        raise UserError(
            f"This CLIP knows {', '.join(known)} already. Connect MODEL and CLIP from before Apply Concept Tokens: "
            "this node applies the concepts itself."
        )
