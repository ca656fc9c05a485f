"""Learn several visual concepts and their masks from one picture or a few.

    from em_core import DiffusersHost, Example, learn_concepts

    host = DiffusersHost.load("path/or/hub-id", device="cuda")
    examples = [Example.read("photo.png", "a photo of <rex:dog> on <shore:beach>")]
    concepts = learn_concepts(host, examples)
    concepts.save("rex.safetensors")
    pictures = host.generate("<rex> in the snow", concepts)

`<name:words>` marks a concept and the words that its token starts from. What else is here:

- `learning(host, examples)` is the same step by step: iterate over it for events, then ask it for
  `concepts()`.
- `find_masks(host, picture, prompt, concepts)` finds masks of words or learned concepts without
  learning anything; `discover(host, picture)` finds what is there without a word, and the prompt to
  learn it with; `refine_masks(picture, masks)` makes masks follow the picture's edges.
  `read_picture(path)` and `read_mask(path)` read files as these take them.
- `learn_visual(host, examples)` also learns to look at the pictures while drawing (ViCo), for details that
  a word cannot carry; `host.generate(prompt, condition=condition)` draws with it, and
  `with_reference(host, condition, picture)` lets it look at another picture.
- `em_settings(family)` and `joint_settings(family, kind)` give the settings that suit a model
  (`host.identity().family`), to be changed with `dataclasses.replace`. Their docstrings name the
  source of every value.
- `PlannedModel(source, device)` learns in the memory that is free: it chooses how by an estimate, and goes
  on with less if memory runs out all the same.
- `RunStore(folder)` keeps finished runs and the states of stopped ones. What it cannot keep is told by a
  `StoreWarning`, and the run goes on.
- Errors meant for the user are `UserError`; `TrainingError` means that a loss was not finite.

A model of another kind takes part by fulfilling the protocol `em_core.model.protocol.DiffusionModel`.
"""

from .errors import StoreWarning, TrainingError, UserError
from .examples import Example
from .hosts.diffusers import DiffusersHost
from .hosts.planned import PlannedModel
from .masks.crf import CRFSettings
from .masks.settings import MaskSettings
from .method.loop import StepEvent
from .pictures import read_mask, read_picture
from .presets import em_settings, joint_settings, vico, visual_settings
from .prompts import ConceptPrompt
from .runs.concept_set import ConceptSet
from .runs.finding import FoundMasks, discover, find_masks, refine_masks
from .runs.learning import Learning, learn_concepts, learning
from .runs.store import RunStore
from .runs.visual import learn_visual, with_reference
from .runs.visual_condition import VisualCondition
from .settings import EMSettings, JointSettings, VisualSettings

__all__ = [
    "CRFSettings",
    "ConceptPrompt",
    "ConceptSet",
    "DiffusersHost",
    "EMSettings",
    "Example",
    "FoundMasks",
    "JointSettings",
    "Learning",
    "MaskSettings",
    "PlannedModel",
    "RunStore",
    "StepEvent",
    "StoreWarning",
    "TrainingError",
    "UserError",
    "VisualCondition",
    "VisualSettings",
    "discover",
    "em_settings",
    "find_masks",
    "joint_settings",
    "learn_concepts",
    "learn_visual",
    "learning",
    "read_mask",
    "read_picture",
    "refine_masks",
    "vico",
    "visual_settings",
    "with_reference",
]
