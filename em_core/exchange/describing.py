"""What exported files say of themselves, and what a user is told of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import DESCRIPTION, UNREADABLE
from ..runs.concept_set import ConceptSet
from .triggers import Triggers

LORA_KIND = "visual-concepts lora 1"
EMBEDDING_KIND = "visual-concepts embedding 1"
KOHYA = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
MODELSPEC = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
PEEK = 2**16
WITH_CLIP = "Load LoRA (Model and CLIP), which ComfyUI 0.8 calls Load LoRA"


def lora_metadata(concepts: ConceptSet, triggers: Triggers, hint: str) -> dict[str, str]:
    """Return a LoRA's metadata, as ComfyUI, A1111 and the ModelSpec standard show it.

    Args:
        concepts: the concepts.
        triggers: concept -> its trigger words; empty for a file without tokens.
        hint: where the file goes, and how it is used.
    """
    family = concepts.identity.family
    words = [" ".join(of) for of in triggers.values()]
    described = {"kind": LORA_KIND, "family": family, "triggers": dict(triggers)}
    found = {
        "ss_base_model_version": KOHYA.get(family, family),
        "ss_tag_frequency": "{}",
        **modelspec(family, "lora", ", ".join(concepts.names), hint),
        DESCRIPTION: json.dumps(described),
    }
    return found | ({"modelspec.trigger_phrase": ", ".join(words)} if words else {})


def embedding_metadata(family: str, concept: str, hint: str) -> dict[str, str]:
    """Return an embedding's metadata: an embedding of another family loads without a word."""
    described = {"kind": EMBEDDING_KIND, "family": family, "concept": concept}
    spec = modelspec(family, "textual-inversion", concept, hint)
    return {**spec, DESCRIPTION: json.dumps(described)}


def modelspec(family: str, kind: str, title: str, hint: str) -> dict[str, str]:
    """Return the entries of the ModelSpec standard that are known."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{MODELSPEC.get(family, family)}/{kind}",
        "modelspec.title": title,
        "modelspec.usage_hint": hint,
    }


def triggers_in_use(files: Sequence[Path]) -> dict[str, str]:
    """Return the trigger words of this package's LoRA files, each with the concept it stands for.

    Of each file, the first bytes alone are read; files of other programs are passed over.
    """
    found: dict[str, str] = {}
    for path in files:
        for concept, words in described_triggers(path).items():
            found |= dict.fromkeys(words, concept)
    return found


def described_triggers(path: Path) -> dict[str, list[str]]:
    """Return the triggers that a LoRA file of this package tells; empty for any other file."""
    return told_triggers(path) or {}


def told_triggers(path: Path) -> dict[str, list[str]] | None:
    """Return the triggers that a LoRA file of this package tells, empty where it has no tokens; None for
    any other file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = file.read(min(length, PEEK))
            if LORA_KIND.encode() not in start:
                return None
            header = json.loads(start + file.read(max(0, min(length, 2**27) - PEEK)))
        described = json.loads(header["__metadata__"][DESCRIPTION])
        return {str(name): list(map(str, words)) for name, words in described["triggers"].items()}
    except (*UNREADABLE, AttributeError):
        return None


def meaning(triggers: Triggers) -> str:
    """Return what the trigger words mean and a prompt that has them."""
    phrases = {name: " ".join(words) for name, words in triggers.items()}
    means = ", ".join(f"`{phrase}` means {name}" for name, phrase in phrases.items())
    return f"{means}; write: a photo of {' and '.join(phrases.values())} on sand"


def for_comfyui(file: str, triggers: Triggers) -> str:
    """Return what is to be told of the file for ComfyUI."""
    if not triggers:
        return (
            f"{file}: weights alone, without tokens. Connect a CLIP to Save Concepts, and it holds the tokens too, "
            "which then need no node of this pack."
        )
    return (
        f"{file}: for ComfyUI, with the tokens in it. Load it with {WITH_CLIP}; the model-only loader drops the "
        f"tokens. {meaning(triggers)}. Strength runs from what the trigger word meant before (0) to what was "
        "learned (1)."
    )


def for_others(file: str, embeddings: Mapping[str, str], error: float, rank: int) -> str:
    """Return what is to be told of the file for other programs."""
    cut = f" It has the changed weights at rank {rank}, without {error:.1%} of the change." * (
        error > 0
    )
    return (
        f"{file}: the LoRA without tokens for diffusers, A1111 and kohya, together with the embedding "
        f"{', '.join(embeddings)}.{cut}"
    )


def for_embeddings(embeddings: Mapping[str, str]) -> str:
    """Return what is to be told of the embeddings: file name -> concept."""
    names = ", ".join(f"embedding:{file} ({concept})" for file, concept in embeddings.items())
    return f"{names}: the tokens alone, for ComfyUI's prompts; A1111 wants the name without 'embedding:'."
