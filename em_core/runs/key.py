"""A hash of all that a run depends on, so that a state continues only its own run."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from ..examples import Example
from ..model.protocol import ModelIdentity
from ..settings import EMSettings, JointSettings, to_json


def run_key(
    identity: ModelIdentity, examples: Sequence[Example], settings: EMSettings, joint: JointSettings
) -> str:
    """Hex digest over the model, the pictures, prompts, masks and settings."""
    digest = hashlib.sha256()
    digest.update(identity.architecture.encode())
    digest.update(identity.sample.cpu().float().numpy().tobytes())
    digest.update(json.dumps([to_json(settings), to_json(joint)], sort_keys=True).encode())
    for example in examples:
        digest.update(str(example.prompt).encode())
        digest.update(np.ascontiguousarray(example.picture.cpu().float().numpy()).tobytes())
        for name, mask in (*sorted(example.masks.items()), *sorted(example.truth.items())):
            digest.update(name.encode() + np.packbits(mask.cpu().numpy()).tobytes())
    return digest.hexdigest()
