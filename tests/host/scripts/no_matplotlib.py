"""The curves' picture where matplotlib cannot be imported."""

import sys

from inside import import_pack, part, start_comfyui

start_comfyui()
import_pack()
sys.modules["matplotlib"] = None  # type: ignore[assignment]

import torch  # noqa: E402

identity = part("em_core.model.identity").ModelIdentity("sd1", "x", {"clip_l": 4}, torch.zeros(1))
concepts = part("em_core.runs.concept_set").ConceptSet(
    (part("em_core.prompts").Concept("rex"),),
    {"rex": {"clip_l": torch.zeros(1, 4)}},
    identity,
    curves={"loss/total": [(1, 0.5), (2, 0.4)]},
)
image = part("em_core.show.plots").draw_curves(concepts.curves)
assert image.mode == "RGB" and image.getextrema()[0][0] < 128, image.size
sys.stdout.write("fine\n")
