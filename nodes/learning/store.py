"""Runs on disk, found again by the content of their inputs; what they take is bounded."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ...em_core.errors import UserError
from ...em_core.examples import Example
from ...em_core.model.protocol import ModelIdentity
from ...em_core.runs.concept_set import ConceptSet
from ...em_core.runs.key import run_key
from ...em_core.settings import EMSettings, JointSettings
from ..host.identity import patcher_digest

MOST_BYTES = 2 * 2**30
MOST_RUNS = 64
VERSION = "1"


def key_of(
    model: Any,
    clip: Any,
    vae: Any,
    examples: Sequence[Example],
    em: EMSettings,
    joint: JointSettings,
    preset: str,
) -> str:
    """Hash of everything a run depends on: models with their patches, examples, settings, preset."""
    digests = [patcher_digest(p) for p in (model, clip.patcher, vae.patcher)]
    parts = [VERSION, preset, *digests, str(clip.layer_idx)]
    acting = hashlib.sha256("".join(parts).encode()).hexdigest()
    identity = ModelIdentity("", acting, {}, torch.zeros(1))
    return run_key(identity, examples, em, joint)


class RunStore:
    """`user/visual_concepts/runs`: finished runs, and the states of stopped ones.

    At most 64 files and 2 GB; the longest unused go first.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(folder_paths.get_user_directory()) / "visual_concepts" / "runs"

    def state_file(self, key: str) -> Path:
        return self.folder / f"{key}.state.safetensors"

    def finished_file(self, key: str) -> Path:
        return self.folder / f"{key}.concepts.safetensors"

    def finished(self, key: str) -> ConceptSet | None:
        """The result of a finished run, or None; a damaged file counts as none."""
        file = self.finished_file(key)
        if not file.is_file():
            return None
        try:
            found = ConceptSet.load(file)
        except UserError:
            file.unlink(missing_ok=True)
            return None
        os.utime(file)
        return found

    def keep(self, key: str, concepts: ConceptSet) -> None:
        """Store a finished run in place of its state."""
        concepts.save(self.finished_file(key))
        self.state_file(key).unlink(missing_ok=True)
        self.prune(keep=self.finished_file(key))

    def prune(self, keep: Path) -> None:
        """Delete the longest unused files until the bounds hold."""
        files = sorted(self.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)
        total, count = sum(f.stat().st_size for f in files), len(files)
        for file in files:
            if total <= MOST_BYTES and count <= MOST_RUNS:
                return
            if file != keep:
                total, count = total - file.stat().st_size, count - 1
                file.unlink(missing_ok=True)
