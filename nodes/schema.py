"""What the nodes' schemas share: socket types, and support for older versions of ComfyUI."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "concepts"
Concepts = io.Custom("VISUAL_CONCEPTS")
Condition = io.Custom("VISUAL_CONDITION")
Examples = io.Custom("CONCEPT_EXAMPLES")
Settings = io.Custom("CONCEPT_SETTINGS")
LoraModel = io.Custom("LORA_MODEL")
LossMap = io.Custom("LOSS_MAP")
ADVANCED = {"extra_dict": {"advanced": True}}
KNOWN = {field.name for field in fields(io.Schema)}


def schema(**given: Any) -> io.Schema:
    """Build a schema from the fields that this version of ComfyUI knows; the others are dropped.

    What a node said and showed is sent again when its result is used again, as after a page reload.
    """
    given = {"has_intermediate_output": True, **given}
    return io.Schema(**{name: value for name, value in given.items() if name in KNOWN})
