"""A hash of everything a run depends on, so that a result or state belongs to one run alone."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from ..examples import Example
from ..model.identity import ModelIdentity
from ..settings import EMSettings, JointSettings, to_json


def run_key(
    model: str, examples: Sequence[Example], settings: EMSettings, joint: JointSettings
) -> str:
    """Return a hex digest of a model's digest and the pictures, prompts, masks and settings."""
    digest = hashlib.sha256(model.encode())
    digest.update(json.dumps([to_json(settings), to_json(joint)], sort_keys=True).encode())
    for example in examples:
        digest.update(f"prompt {example.prompt} picture {tuple(example.picture.shape)}".encode())
        digest.update(np.ascontiguousarray(example.picture.cpu().float().numpy()).tobytes())
        for kind, masks in (("mask", example.masks), ("truth", example.truth)):
            for name, mask in sorted(masks.items()):
                digest.update(
                    f"{kind} {name} ".encode() + np.packbits(mask.cpu().numpy()).tobytes()
                )
    return digest.hexdigest()


def model_digest(identity: ModelIdentity) -> str:
    """Return a hex digest of a model's shapes and of the values that its identity samples."""
    sample = identity.sample.cpu().float().numpy().tobytes()
    return hashlib.sha256(identity.architecture.encode() + sample).hexdigest()
