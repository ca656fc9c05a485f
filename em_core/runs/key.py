"""A hash of everything a run depends on, so that a result or state belongs to one run alone."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..examples import Example
from ..model.protocol import DiffusionModel
from ..prompts import ConceptPrompt
from ..settings import EMSettings, JointSettings, VisualSettings, to_json
from .concept_set import ConceptSet
from .digest import Digest

CORE = Path(__file__).parents[1]
ELSEWHERE = (
    "commands",
    "demo",
    "evaluate",
    "jobs",
    "show",
)  # parts of the core that no run depends on
IN_NODES = ("host", "learning")


def run_key(
    model: str,
    examples: Sequence[Example],
    settings: EMSettings,
    joint: JointSettings,
    visual: VisualSettings | None = None,
    concepts: ConceptSet | None = None,
) -> str:
    """Return a hex digest of all that acts on a run.

    True masks do not act, since they are only compared with, and masks act in mode "given" alone. White
    space in prompts does not act either.

    Args:
        model: digest of the model, such as :func:`model_digest` of its host.
        examples: pictures, prompts and masks.
        settings, joint, visual: settings of the phases.
        concepts: learned concepts that the run starts from.
    """
    parts = run_parts(model, examples, settings, joint, visual, concepts)
    return Digest().add([pack_digest(), *parts.values()]).hexdigest()


def run_parts(
    model: str,
    examples: Sequence[Example],
    settings: EMSettings,
    joint: JointSettings,
    visual: VisualSettings | None = None,
    concepts: ConceptSet | None = None,
) -> dict[str, Any]:
    """Return all that acts on a run but this package's version, by what people call it; see :func:`run_key`."""
    given = settings.mode == "given"
    return {
        "model or memory plan": model,
        "settings": [to_json(s) for s in (settings, joint, visual) if s is not None],
        "pictures": [example.picture.float() for example in examples],
        "prompts": [prompt_parts(example.prompt) for example in examples],
        "masks": [dict(sorted(e.masks.items())) for e in examples] if given else [],
        "concepts to start from": []
        if concepts is None
        else [concepts.vectors, concepts.weights, concepts.lora_scale],
    }


def part_digests(parts: Mapping[str, Any]) -> dict[str, str]:
    """Return a hex digest of each part of a run."""
    return {name: Digest().add(part).hexdigest() for name, part in parts.items()}


def prompt_parts(prompt: ConceptPrompt) -> list[Any]:
    """Return the words and the concepts of a prompt, in order."""
    return [
        part.split() if isinstance(part, str) else (part.name, part.words)
        for part in prompt.parts
        if not isinstance(part, str) or part.strip()
    ]


def model_digest(host: DiffusionModel) -> str:
    """Return a hex digest of a host's model, its schedule and what it predicts.

    Every weight counts where the host has a method `fingerprint` that hashes them; otherwise those that
    its identity samples.

    Raises:
        Unreadable: the content of the schedule cannot be read.
    """
    identity = host.identity()
    own = getattr(host, "fingerprint", str)()
    acting = [
        identity.family,
        identity.architecture,
        dict(identity.encoders),
        identity.sample.float(),
        own,
    ]
    return Digest().add([*acting, host.schedule, host.image_side, host.image_multiple]).hexdigest()


@functools.cache
def pack_digest() -> str:
    """Return a hash of this package's version and of the source files that runs depend on."""
    try:
        digest = hashlib.sha256(version("visual-concepts").encode())
    except PackageNotFoundError:  # inside ComfyUI nothing is installed
        digest = hashlib.sha256()
    for file in acting_sources(CORE):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def acting_sources(core: Path) -> list[Path]:
    """Return the source files that runs depend on, in an order that is the same everywhere."""
    files = [f for f in core.rglob("*.py") if f.relative_to(core).parts[0] not in ELSEWHERE]
    if (core.parent / "pyproject.toml").is_file():  # a checkout, or a folder of ComfyUI
        files += [f for part in IN_NODES for f in (core.parent / "nodes" / part).rglob("*.py")]
    return sorted(files, key=lambda file: file.relative_to(core.parent).as_posix())


pack_digest()  # of the code that is loaded, not of what may have replaced it by the first run
