"""Models that LearnConcepts must refuse, each with a reason that its user understands."""

import sys
from collections.abc import Callable
from typing import Any

import reduced
from inside import import_pack, part

import_pack()

import comfy.hooks  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import torch  # noqa: E402

families, copies = part("nodes.host.families"), part("nodes.host.copies")
UserError = part("em_core.errors").UserError


class PackedWeight(torch.Tensor):
    """Stands for the tensor subclasses of loaders of quantised files."""


def refused(words: str, attempt: Callable[[], Any]) -> None:
    """The attempt raises a UserError that says `words`."""
    try:
        attempt()
    except UserError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {words}")


def identify(model: Any, clip: Any) -> Any:
    return families.identify(model, clip, vae)


def copy_of(model: Any) -> Any:
    return copies.private_patcher(model, "MODEL", lambda name: torch.float32)


def inpainting() -> Any:
    model = reduced.unet("sd1")
    model.model.diffusion_model.in_channels = 9
    return model


def other_architecture() -> Any:
    model = reduced.unet("sd1")
    model.model.__class__ = comfy.model_base.SD21UNCLIP
    return model


def with_weight(make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """An SD 1.x model one of whose weights is of another kind."""
    model = reduced.unet("sd1")
    layer = model.model.diffusion_model.out[2]
    layer.weight = torch.nn.Parameter(make(layer.weight.data), requires_grad=False)
    return model


def tiny_vae(channels: int) -> Any:
    """The small autoencoder of a family with so many latent channels, from its state dict."""
    made = comfy.taesd.taesd.TAESD(latent_channels=channels)
    reduced.randomise(made, torch.float32, 3)
    return comfy.sd.VAE(sd=made.state_dict())


def no_vae() -> Any:
    """What checkpoint loaders give for a checkpoint that has none."""
    return comfy.sd.VAE(sd={})


def with_hooks(clip: Any) -> Any:
    from comfy_extras.nodes_hooks import SetClipHooks

    return SetClipHooks().apply_hooks(clip, False, True, comfy.hooks.HookGroup())[0]


def scaled_fp8() -> Any:
    model = reduced.unet("sd1", "fp8")
    model.model.diffusion_model.out[2].scale_weight = torch.ones(1)
    return model


def learned_on_sdxl() -> Any:
    widths = {"clip_l": 32, "clip_g": 64}
    identity = part("em_core.model.identity").ModelIdentity("sdxl", "", widths, torch.zeros(1))
    vectors = {"rex": {name: torch.zeros(1, width) for name, width in widths.items()}}
    concept = part("em_core.prompts").Concept("rex", "dog")
    return part("em_core.runs.concept_set").ConceptSet((concept,), vectors, identity)


with torch.inference_mode():
    vae = reduced.vae()
    sd1, sd1_clip = reduced.unet("sd1"), reduced.clip("sd1")
    assert list(identify(sd1, sd1_clip).encoders) == ["clip_l"]
    refused("9 input channels", lambda: identify(inpainting(), sd1_clip))
    refused("SD21UNCLIP", lambda: identify(other_architecture(), sd1_clip))
    refused("different families", lambda: identify(sd1, reduced.clip("sdxl")))
    refused("different families", lambda: identify(reduced.unet("sdxl"), sd1_clip))
    find = families.identify
    refused("has no CLIP", lambda: find(sd1, None, vae))
    refused("Load VAE", lambda: find(sd1, sd1_clip, None))
    refused("has no VAE", lambda: find(sd1, sd1_clip, no_vae()))
    refused("has no MODEL", lambda: find(None, sd1_clip, vae))
    find(sd1, sd1_clip, tiny_vae(4))
    refused("got one with 16", lambda: find(sd1, sd1_clip, tiny_vae(16)))
    refused("Set CLIP Hooks", lambda: identify(sd1, with_hooks(sd1_clip)))
    copy_of(sd1)
    refused("int8", lambda: copy_of(with_weight(lambda w: w.to(torch.int8))))
    refused("PackedWeight", lambda: copy_of(with_weight(lambda w: w.as_subclass(PackedWeight))))
    refused("scaled fp8", lambda: copy_of(scaled_fp8()))
    apply_concepts = part("nodes.host.application").apply_concepts
    refused("has no CLIP", lambda: apply_concepts(sd1, None, learned_on_sdxl(), 1.0))
    refused(
        "do not fit this CLIP",
        lambda: apply_concepts(sd1, sd1_clip, learned_on_sdxl(), 1.0),
    )
sys.stdout.write("all are refused\n")
