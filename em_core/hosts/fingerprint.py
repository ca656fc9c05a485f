"""A hash of all that acts in a pipeline of diffusers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..runs.digest import Digest
from .text import TextEncoder


def dict_of(config: Any) -> dict[str, Any]:
    """Return the configuration of a module of diffusers or transformers."""
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def is_about_files(name: str) -> bool:
    """Return whether an entry of a configuration says where it came from, not what it does."""
    return name.startswith("_") or name in ("transformers_version", "architectures")


def fingerprint(
    parts: Mapping[str, nn.Module], encoders: Sequence[TextEncoder], settings: Mapping[str, Any]
) -> str:
    """Return a hash of modules with their configurations, of vocabularies, and of further settings."""
    digest = Digest()
    for name, module in parts.items():
        config = json.loads(json.dumps(dict_of(module.config), default=str))
        digest.add([name, {k: x for k, x in sorted(config.items()) if not is_about_files(k)}])
        digest.add(dict(sorted(module.named_parameters())))
    for encoder in encoders:
        digest.add(sorted(encoder.tokenizer.get_vocab().items()))
        digest.add([encoder.name, encoder.tokenizer.pad_token_id])
    return digest.add(dict(settings)).hexdigest()
