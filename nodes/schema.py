"""What the nodes' schemas share: socket types, and what older versions of ComfyUI do not know."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "concepts"
Concepts = io.Custom("VISUAL_CONCEPTS")
Examples = io.Custom("CONCEPT_EXAMPLES")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
ADVANCED = {"extra_dict": {"advanced": True}}
KNOWN = {field.name for field in fields(io.Schema)}


def schema(**given: Any) -> io.Schema:
    """A schema without the parts that this version of ComfyUI does not have."""
    return io.Schema(**{name: value for name, value in given.items() if name in KNOWN})
