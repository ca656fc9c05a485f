"""How much room the editor's nodes take."""

from __future__ import annotations

import math
from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
HEAD = 30
"""Pixels of a node's title, which lies above its position."""
SLOT, WIDGET, TEXT_AREA = 20, 24, 68
BADGE = 28
"""Of a pack's name below its nodes, in Nodes 2.0."""
WIDTHS = {
    "KSampler": 300,
    "VAEDecode": 300,
    "ApplyConceptTokens": 300,
    "PreviewAny": 260,
    "CLIPTextEncode": 300,
    "LearnConcepts": 320,
    "CompareConceptMasks": 272,
}
PICTURES = {
    "LearnConcepts": 230, "LearnVisualCondition": 230, "LoadImage": 240, "ExtractLatentMasks": 230,
    "DiscoverConcepts": 230,
}  # fmt: skip
"""Room for pictures that a node shows itself."""
LEAST_PREVIEW, LEAST_SAVED = 266, 302
"""Heights below which Nodes 2.0 does not show a picture, without and with a file name's widget."""
SAY = {
    "LearnConcepts": 232, "LearnVisualCondition": 210, "SaveConcepts": 226, "LoadConcepts": 72,
    "DiscoverConcepts": 110,
    "ExtractLatentMasks": 110, "CompareConceptMasks": 92, "SaveVisualCondition": 92,
    "MaskTrainingConditioning": 72, "ConceptMaskByName": 54, "SaveConceptTrainingSet": 170,
    "EvaluateConcepts": 170,
}  # fmt: skip
"""Room for what a node of this pack says when it has run."""


def is_widget(spec: list[Any]) -> bool:
    """Whether an input is a widget, as /object_info describes it."""
    options = spec[1] if len(spec) > 1 else {}
    kind = spec[0]
    return not options.get("forceInput") and (isinstance(kind, list) or kind in WIDGET_TYPES)


def has_control(name: str, spec: list[Any]) -> bool:
    """Whether the editor adds 'control after generate' to a widget."""
    options = spec[1] if len(spec) > 1 else {}
    return bool(options.get("control_after_generate", name in ("seed", "noise_seed")))


def least_height(
    kind: str, specs: dict[str, list[Any]], sockets: int, outputs: int, ours: bool
) -> int:
    """The height of a node without its title: sockets, widgets, and what it will show."""
    widgets = {name: spec for name, spec in specs.items() if is_widget(spec)}
    areas = sum(bool(len(s) > 1 and s[1].get("multiline")) for s in widgets.values())
    controls = sum(has_control(name, spec) for name, spec in widgets.items())
    lines = len(widgets) - areas + controls
    own = SLOT * max(sockets, outputs) + WIDGET * lines + TEXT_AREA * areas + 12
    said = SAY.get(kind, BADGE if ours else 0)
    return own + PICTURES.get(kind, 0) + said


def note_height(text: str, width: int) -> int:
    """The height of a note whose text is wrapped at a width."""
    each = max(1, (width - 24) // 6)
    lines = sum(math.ceil(len(line) / each) for line in text.split("\n"))
    return 44 + 15 * lines + 12 * text.count("\n\n")
