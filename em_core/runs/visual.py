"""Learn a visual condition from beginning to end, and give it other references."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Bool
from torch import Tensor

from ..errors import UserError
from ..examples import Example
from ..method.problem import prepare, prepare_picture
from ..model.protocol import DiffusionModel, visual_model
from ..model.visual_drawing import Reference
from ..pictures import Picture
from ..presets import em_settings, visual_settings
from ..prompts import Concept, ConceptPrompt
from ..settings import EMSettings, JointSettings, VisualSettings
from .concept_set import ConceptSet
from .finding import find_masks
from .learning import carry_out, key_or_none
from .runner import Listener
from .store import RunStore
from .visual_condition import VisualCondition, conclude_condition


def learn_visual(
    host: DiffusionModel,
    examples: Sequence[Example],
    settings: EMSettings | None = None,
    visual: VisualSettings | None = None,
    concepts: ConceptSet | None = None,
    *,
    listeners: Sequence[Listener] = (),
    store: RunStore | None = None,
    key: str | None = None,
) -> VisualCondition:
    """Learn image attention for each concept in the examples' prompts (ViCo, arXiv 2306.00971).

    Args:
        host: the model, such as :class:`em_core.DiffusersHost`.
        examples: pictures with their prompts.
        settings: settings of the EM loop, which comes first; None takes the defaults of the model's
            family.
        visual: settings of the visual phase; None takes the defaults of the model's family. See
            :func:`em_core.presets.vico` for ViCo's own.
        concepts: learned concepts to start from. If they are all that the prompts name, there is no EM
            loop: masks come from their attention. Weights that were learned with them are applied.
        listeners: called with the event and the state of every step.
        store, key: as of :func:`em_core.learn_concepts`.

    Raises:
        UserError: examples, settings, concepts and model do not go together.
        TrainingError: a loss is not finite; with a store, the last good step is kept.
    """
    family = host.identity().family
    settings, visual = settings or em_settings(family), visual or visual_settings(family)
    visual_model(host)
    if store is not None and key is None:
        key = key_or_none(host, examples, settings, JointSettings(), visual, concepts)
    weights = (concepts.weights, concepts.lora_scale) if concepts else ({}, 1.0)
    known = concepts.vectors if concepts else None
    return carry_out(
        lambda: prepare(host, examples, settings, None, visual, known),
        lambda made, state: conclude_condition(made, state, concepts),
        VisualCondition,
        lambda: host.applied(*weights),
        examples=examples,
        listeners=listeners,
        store=store,
        key=key,
    )


def with_reference(
    host: DiffusionModel,
    condition: VisualCondition,
    picture: Picture,
    masks: Mapping[str, Bool[Tensor, "H W"]] | None = None,
) -> VisualCondition:
    """Return the condition with one other picture to look at, in place of those that it was learned from.

    Args:
        host: the model.
        condition: the condition.
        picture: [3, H, W], RGB in 0..1, of any size.
        masks: concept -> where it is in the picture; None finds that by the tokens' attention.

    Raises:
        UserError: a mask is empty, or a concept was not found in the picture.
    """
    marked: list[str | Concept] = []
    for name in masks or condition.names:
        marked += [" and " if marked else "a photo of ", Concept(name)]
    prompt = ConceptPrompt(tuple(marked))
    family = em_settings(host.identity().family)
    prepared = prepare_picture(host, Example(picture, prompt), replace(family.masks, crf=None))
    seen: dict[str, Tensor | None] = dict(masks or {})
    if condition.settings.key_masks == "otsu" and not masks:
        seen = {name: None for name in condition.names}
    elif not masks:
        found = find_masks(host, picture, prompt, condition.concepts, family.masks)
        if found.missing:
            raise UserError(
                f"{', '.join(found.missing)} was not found in the reference. Use a picture that shows it, or give "
                "a mask of where it is."
            )
        seen = dict(zip(found.names, found.masks, strict=True))
    empty = [name for name, mask in seen.items() if mask is not None and not bool(mask.any())]
    if empty:
        raise UserError(
            f"The reference's mask of {', '.join(empty)} is empty. Expected white where the concept is."
        )
    return replace(condition, references=(Reference(prepared.Z0[0].cpu(), seen),))
