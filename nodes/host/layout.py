"""Restrict where each concept may act, with masks on the cross-attention of its columns.

The CLIP remembers at which columns its concepts stand in all that it encodes. When sampling begins, the
MODEL looks each conditioning's text up there, also in what other nodes have joined or averaged, and its
patch shuts a concept's columns off for the pixels outside its mask. Attention patches that are already
there run first, and what they add is kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from comfy.conds import CONDConstant
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...em_core.errors import UserError
from ...em_core.masks.resizing import Size, resize
from ...em_core.prompts import ConceptVectors
from .attention import CROSS, attention_modules
from .encodings import Columns, Encodings
from .noting import noting_clip

NOTE = "concept_columns"
SIZE = "concept_latent_size"
OFF = -1e4
PARTS = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


@dataclass(frozen=True)
class Note:
    """What a conditioning tells the attention patches.

    Attributes:
        columns: where the concepts stand in its text.
        area: (height, width, top, left) of the part of the latent that it is for; None is the whole.
    """

    columns: Columns
    area: tuple[int, ...] | None = None


class CONDNote(CONDConstant):
    """A note that learns from the sampler which part of the latent its conditioning is for."""

    def process_cond(self, batch_size: int, area: Any = None, **others: Any) -> "CONDNote":
        return CONDNote(replace(self.cond, area=None if area is None else tuple(map(int, area))))


@dataclass
class Memory:
    """What a layout's MODEL and CLIP know of the texts and sizes that they have met.

    Attributes:
        encodings: what the CLIP has encoded.
        biases: what is added to the logits, computed once per size.
    """

    encodings: Encodings = field(default_factory=Encodings)
    biases: dict[Any, Tensor] = field(default_factory=dict)


# Apart from the layouts, since what is patched into a MODEL is part of a run's key.
MEMORIES: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Layout:
    """The masks of one ApplyConceptTokens, shared by its MODEL and its CLIP.

    Attributes:
        masks: concept -> [H, W] mask of the whole picture.
    """

    masks: Mapping[str, Float[Tensor, "_ _"]]

    @property
    def key(self) -> str:
        """Name of the notes that belong to this layout: several may act on one MODEL, for different concepts."""
        return f"{NOTE}_{'_'.join(self.masks)}"

    @property
    def memory(self) -> Memory:
        return MEMORIES.setdefault(self, Memory())

    def bias(self, note: Note, options: Mapping[str, Any], q: Tensor, tokens: int) -> Tensor:
        """Return what is added to a layer's logits [q, t]: a large negative number outside the masks.

        Raises:
            UserError: the layer does not see the part of the picture that the note is for.
        """
        latent = tuple(options["original_shape"][-2:])
        whole = tuple(options.get(SIZE, latent))
        if latent != (note.area[:2] if note.area else whole):
            raise refused("draws the picture in tiles")
        layer = tuple(options["activations_shape"][-2:])
        if layer[0] * layer[1] != q.shape[1]:
            raise refused("changes how many spots of the picture attend to the prompt")
        key = (note, whole, layer, tokens, q.device, q.dtype)
        biases = self.memory.biases
        if key not in biases:
            biases[key] = shut_off(note, self.masks, whole, layer, tokens).to(q)
        return biases[key]


def refused(what: str) -> UserError:
    return UserError(
        f"The masks of Apply Concept Tokens cannot act here, because another node {what}. For this sampler, "
        "connect a MODEL from an Apply Concept Tokens without masks, or leave that node out."
    )


def laid_out(model: Any, clip: Any, vectors: ConceptVectors, masks: Mapping[str, Tensor]) -> Any:
    """Return a MODEL and a CLIP with which each concept acts only inside its mask."""
    layout = Layout(dict(masks))

    def mark(plain: dict[str, Any], columns: Columns) -> None:
        noted = {layout.key: CONDNote(Note(columns))}
        plain["model_conds"] = {**plain.get("model_conds", {}), **noted}

    clip = noting_clip(clip, vectors, lambda: layout.memory.encodings, mark)
    return laid_out_model(model, layout), clip


def laid_out_model(model: Any, layout: Layout) -> Any:
    """Return a MODEL in which each concept acts only inside its mask."""
    twin = model.clone()
    key = layout.key
    twin.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, noting_conditionings(layout))
    twin.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, pass_size_on)
    twin.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, passing_note_on(key))
    options = twin.model_options["transformer_options"]
    replaced = dict(options.get("patches_replace", {}).get("attn2", {}))
    for name in attention_modules(twin.model.diffusion_model, CROSS):
        part, _, rest = name.partition(".")
        number = 0 if part == "middle_block" else int(rest.partition(".")[0])
        replaced.setdefault((PARTS[part], number), None)
    wrapped = {block: attend_inside(layout, before) for block, before in replaced.items()}
    options["patches_replace"] = {**options.get("patches_replace", {}), "attn2": wrapped}
    return twin


def noting_conditionings(layout: Layout) -> Callable[..., Any]:
    """Return a wrapper of a whole sampling that notes in each conditioning where the concepts stand."""

    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for conditionings in executor.class_obj.conds.values():
            for plain in conditionings or ():
                columns = layout.memory.encodings.find(plain.get("cross_attn"))
                if columns is not None:
                    others = {k: v for k, v in plain["model_conds"].items() if k != layout.key}
                    noted = {layout.key: CONDNote(Note(columns))} if columns.positions else {}
                    plain["model_conds"] = {**others, **noted}
        try:
            return executor(*args, **kwargs)
        finally:
            layout.memory.biases.clear()

    return sample


def pass_size_on(
    executor: Any, model: Any, conds: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]
) -> Any:
    """Tell the attention patches the size of the whole latent, of which an area may be cut."""
    told = {**options.get("transformer_options", {}), SIZE: tuple(x.shape[-2:])}
    return executor(model, conds, x, timestep, {**options, "transformer_options": told})


def passing_note_on(key: str) -> Callable[..., Any]:
    """Return a wrapper of the UNet that hands a note from the conditioning to the attention patches."""

    def forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        note = kwargs.pop(key, None)
        if note is None or not note.columns.positions:
            return executor(*args, **kwargs)
        if "transformer_options" in kwargs:
            kwargs["transformer_options"] = kwargs["transformer_options"] | {key: note}
            return executor(*args, **kwargs)
        return executor(*args[:-1], args[-1] | {key: note}, **kwargs)

    return forward


def attend_inside(layout: Layout, before: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """Return an attention that shuts concepts off outside their masks, on top of the patch `before`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        heads, precision = options["n_heads"], options.get("attn_precision")
        note = options.get(layout.key)

        def plain(mask: Tensor | None = None) -> Tensor:
            return optimized_attention(
                q, k, v, heads, mask=mask, attn_precision=precision, transformer_options=options
            )

        if note is None:
            return plain() if before is None else before(q, k, v, options)
        inside = plain(layout.bias(note, options, q, k.shape[1]))
        return inside if before is None else before(q, k, v, options) + inside - plain()

    return attend


def shut_off(
    note: Note, masks: Mapping[str, Tensor], whole: Size, layer: Size, tokens: int
) -> Float[Tensor, "q t"]:
    """Return what is added to the logits: a large negative number outside a concept's mask."""
    bias = torch.zeros(layer[0] * layer[1], tokens)
    for name, positions in note.columns.positions:
        mask = masks[name].float().cpu()
        small = resize(
            mask if note.area is None else cut_out(mask, whole, note.area), layer, "mask"
        )
        outside = rearrange(small, "h w -> (h w)") < 0.5
        bias[:, list(positions)] = outside[:, None] * OFF
    return bias


def cut_out(mask: Float[Tensor, "H W"], whole: Size, area: tuple[int, ...]) -> Tensor:
    """Return the part of a mask of the whole picture that lies in an area, given in parts of the latent."""
    sides = [max(of_mask, of_latent) for of_mask, of_latent in zip(mask.shape, whole, strict=True)]
    mask = resize(mask, (sides[0], sides[1]), "mask")
    for axis, (length, start) in enumerate(zip(area[:2], area[2:], strict=True)):
        scale = sides[axis] / whole[axis]
        first, last = round(start * scale), round((start + length) * scale)
        mask = mask.narrow(axis, first, max(1, last - first))
    return mask
