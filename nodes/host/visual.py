"""A visual condition on clones of a MODEL and a CLIP: blocks that look at references while sampling.

Nothing is patched into the UNet. A wrapper of its forward pass attaches hooks for as long as the pass
takes, so the condition goes with whatever the wrapper goes with, and every other node's patches act as
they would without it. The references go through the same UNet at the same time, as it is loaded, with
its LoRAs but without other nodes' attention patches and ControlNets, which are about the picture that is
drawn.
"""

import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import comfy.sd
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.exchange.lora import lora_tensors
from ...em_core.files import raw_bytes
from ...em_core.hosts.visual import say_unseen
from ...em_core.model.visual import image_places
from ...em_core.model.visual_drawing import Seen, SeenCache, Viewer, VisualUse
from ...em_core.runs.visual_condition import VisualCondition
from ..telling import show_on_node
from .application import require_same_family
from .attention import attention_layers
from .encodings import Columns, Encodings
from .families import require_there, require_unet, text_encoders
from .noting import noting_clip
from .text import ConceptTokens, require_same_count, with_concepts

LAST = 999.0
TAKEN = ("x", "timesteps", "context", "y", "control", "transformer_options")


@dataclass
class Prompt:
    """A conditioning whose text has concepts of a condition.

    Attributes:
        columns: where they stand.
        key: tells the text, the weights and the hooks that it is encoded and run with.
        context, y: what the UNet is given of it, once sampling has begun.
    """

    columns: Columns
    key: Any
    context: Tensor | None = None
    y: Tensor | None = None


@dataclass
class Memory:
    """What an applied condition knows of the texts that it has met and of the sampling that goes on.

    Attributes:
        encodings: what the CLIP has encoded.
        cache: what was seen of the references, by time and prompt.
        prompts: those of the present sampling, by their conditionings' ids.
        viewers: of each UNet that is run.
    """

    encodings: Encodings = field(default_factory=Encodings)
    cache: SeenCache = field(default_factory=SeenCache)
    prompts: dict[Any, Prompt] = field(default_factory=dict)
    viewers: dict[int, Viewer] = field(default_factory=dict)


# Apart from the conditions, since what is patched into a MODEL is part of a run's key.
MEMORIES: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
COUNT = itertools.count()


@dataclass(frozen=True, eq=False)
class Sight:
    """One ApplyVisualCondition, shared by its MODEL and its CLIP."""

    use: VisualUse

    @property
    def key(self) -> str:
        return f"visual_condition_{'_'.join(self.use.concepts)}"

    @property
    def memory(self) -> Memory:
        return MEMORIES.setdefault(self, Memory())


def apply_visual(
    model: Any, clip: Any, condition: VisualCondition, use: VisualUse
) -> tuple[Any, Any, str]:
    """Return clones of MODEL and CLIP on which the condition acts, and what a user should know.

    A concept that the CLIP knows already keeps the token that it has, and its weights are not applied
    again: an Apply Concept Tokens has done so.

    Raises:
        UserError: the condition was learned on a different family, or there is nothing to look at.
    """
    require_there(model=model, clip=clip)
    require_unet(model)
    require_same_family(condition.concepts, clip)
    require_same_count(condition.concepts.vectors)
    viewer_of(use, model.model.diffusion_model)
    if not use.concepts:
        raise UserError("The visual condition has nothing to look at. Learn it again.")
    known, said = known_vectors(clip, condition)
    new = {n: by for n, by in condition.concepts.vectors.items() if n not in known}
    lora = lora_tensors(condition.concepts) if not known else {}
    if lora:
        model, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    else:
        model, clip = model.clone(), clip.clone()
    vectors = known | {
        n: {e: v.detach().clone().float() for e, v in by.items()} for n, by in new.items()
    }
    own = {name: vectors[name] for name in new}
    clip.tokenizer = with_concepts(clip.tokenizer, own, tuple(text_encoders(clip)))
    if use.strength == 0:
        return model, clip, said
    sight = Sight(use)

    def mark(plain: dict[str, Any], columns: Columns) -> None:
        plain[sight.key] = columns

    clip = noting_clip(clip, vectors, lambda: sight.memory.encodings, mark)
    return seeing(model, sight), clip, said


def known_vectors(
    clip: Any, condition: VisualCondition
) -> tuple[dict[str, Mapping[str, Tensor]], str]:
    """Return the vectors of those concepts that a CLIP knows already, and a word on those that are not
    the condition's."""
    parts = {name: getattr(clip.tokenizer, name) for name in text_encoders(clip)}
    if not all(isinstance(part, ConceptTokens) for part in parts.values()):
        return {}, ""
    known: dict[str, Mapping[str, Tensor]] = {
        name: {encoder: part.concepts[name] for encoder, part in parts.items()}
        for name in condition.concepts.names
        if all(name in part.concepts for part in parts.values())
    }
    ours = condition.concepts.vectors
    other = [
        name
        for name, by in known.items()
        if any(
            v.shape != ours[name][e].shape or not torch.equal(v, ours[name][e])
            for e, v in by.items()
        )
    ]
    said = (
        f"The CLIP knows {', '.join(other)} already, by another token than the one that the visual condition was "
        "learned with. It keeps its own; connect the concepts of Learn Visual Condition to Apply Concept Tokens if "
        "that is not meant."
    )
    return known, said if other else ""


def viewer_of(use: VisualUse, unet: Any) -> Viewer:
    """Return what lets a condition act in a UNet.

    Raises:
        UserError: it was learned on another family.
    """
    return Viewer(
        use, unet, lambda size: image_places(attention_layers(unet, size), unet), attention
    )


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, seen: Tensor | None) -> Tensor:
    """ComfyUI's own attention; what is not seen has been left out."""
    return optimized_attention(q, k, v, heads)


def seeing(model: Any, sight: Sight) -> Any:
    """Return a MODEL on which a condition acts."""
    twin = model.clone()
    twin.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, sight.key, knowing_prompts(sight))
    twin.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, sight.key, knowing_texts(sight))
    twin.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, sight.key, looking(sight))
    return twin


def knowing_prompts(sight: Sight) -> Callable[..., Any]:
    """Return a wrapper of a whole sampling that finds the conditionings with the condition's concepts."""

    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        memory, guider = sight.memory, executor.class_obj
        memory.prompts.clear()
        for kind in sorted(guider.conds, key=lambda kind: kind != "positive"):
            for plain in guider.conds[kind] or ():
                columns = memory.encodings.find(plain.get("cross_attn")) or plain.get(sight.key)
                if columns is not None and acting(sight, columns):
                    key = prompt_key(plain, guider.model_patcher)
                    memory.prompts[plain["uuid"]] = Prompt(columns, key)
        if not memory.prompts:
            logging.warning(say_unseen(sight.use))
            show_on_node(say_unseen(sight.use))
        try:
            return executor(*args, **kwargs)
        finally:
            memory.prompts.clear()
            memory.viewers.clear()

    return sample


def acting(sight: Sight, columns: Columns) -> bool:
    """Return whether a text has a concept of the condition."""
    return any(name in sight.use.concepts and where for name, where in columns.positions)


def prompt_key(plain: Mapping[str, Any], patcher: Any) -> Any:
    """Return what a prompt's view of the references depends on, besides the time; what cannot be told
    is new every time."""
    pooled = plain.get("pooled_output")
    held = [x for x in (plain.get("cross_attn"), pooled) if torch.is_tensor(x)]
    text = sha256(b"".join(bytes(raw_bytes(x.float())) for x in held)).hexdigest()
    hooked = next(COUNT) if plain.get("hooks") is not None else -1
    return text, str(getattr(patcher, "patches_uuid", next(COUNT))), hooked


def knowing_texts(sight: Sight) -> Callable[..., Any]:
    """Return a wrapper of each step's predictions that keeps what the UNet will be given of the prompts.

    All conditionings come here together, also where the UNet gets them one by one.
    """

    def calculate(executor: Any, model: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        for plain in itertools.chain.from_iterable(group or () for group in conds):
            prompt = sight.memory.prompts.get(plain.get("uuid"))
            if prompt is not None:
                given = plain["model_conds"]
                prompt.context = given["c_crossattn"].cond[:1]
                prompt.y = given["y"].cond[:1] if "y" in given else None
        return executor(model, conds, *args, **kwargs)

    return calculate


def looking(sight: Sight) -> Callable[..., Any]:
    """Return a wrapper of the UNet that lets the blocks act in its pass."""

    def forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(TAKEN, args, strict=False)) | kwargs
        memory, unet = sight.memory, executor.class_obj
        options, t = given.get("transformer_options") or {}, given["timesteps"]
        ready = {u: p for u, p in memory.prompts.items() if p.context is not None}
        if not ready or not sight.use.acts_at(float(t.flatten()[0]), LAST):
            return executor(*args, **kwargs)
        viewer = memory.viewers.setdefault(id(unet), viewer_of(sight.use, unet))
        ids = options.get("uuids") or [None]
        rows = len(given["x"]) // len(ids)
        seen = [
            see(sight, viewer, unet, given, ready, uuid, number * rows)
            for number, uuid in enumerate(ids)
        ]
        viewer.chunks, viewer.acted = tuple(seen), set()
        try:
            with viewer.attached():
                out = executor(*args, **kwargs)
        finally:
            viewer.chunks = ()
        if viewer.acted != set(viewer.places):
            raise UserError(
                "The visual condition cannot act, because another node runs something else in the UNet's place, "
                "such as a compiled one. Leave that node out, or set the condition's strength to 0."
            )
        return out

    return forward


def see(
    sight: Sight,
    viewer: Viewer,
    unet: Any,
    given: Mapping[str, Any],
    prompts: Mapping[Any, Prompt],
    uuid: Any,
    row: int,
) -> Seen:
    """Return what one part of a batch sees of the references: under its own prompt, or, where that has
    no concept, under the first one that has; ViCo's way is its own text with the other's columns."""
    prompt = prompts.get(uuid) or next(iter(prompts.values()))
    context, y, key = prompt.context, prompt.y, prompt.key
    if sight.use.own_prompts and uuid not in prompts:
        context = given["context"][row : row + 1]
        y = None if given.get("y") is None else given["y"][row : row + 1]
        key = (*prompt.key, sha256(bytes(raw_bytes(context.float()))).hexdigest())
    x, t = given["x"], given["timesteps"].flatten()[:1]
    columns = dict(prompt.columns.positions)

    def run(latent: Tensor) -> None:
        unet._forward(
            latent.to(x),
            t,
            context=None if context is None else context.to(x),
            y=None if y is None else y.to(x),
            control=None,
            transformer_options=for_references(given.get("transformer_options") or {}, uuid),
        )

    def make() -> Seen:
        with viewer.attached():
            return viewer.look(run, columns, prompt.columns.length)

    return sight.memory.cache.get((float(t), key, str(x.dtype)), make, x.device)


def for_references(options: Mapping[str, Any], uuid: Any) -> dict[str, Any]:
    """Return transformer options without what other nodes do to the picture that is drawn."""
    kept = {k: v for k, v in options.items() if k not in ("patches", "patches_replace")}
    return kept | {"cond_or_uncond": [0], "uuids": [uuid]}
