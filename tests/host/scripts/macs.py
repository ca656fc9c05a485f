"""Macs have no float64 on their device: neither a run nor drawing inside ComfyUI makes any there."""

import sys
from typing import Any

import reduced
from inside import ROOT, import_pack, part

import_pack()
sys.path.append(str(ROOT / "tests" / "core"))

import torch  # noqa: E402
from no_doubles import NoDoubles  # noqa: E402

families, hosts = part("nodes.host.families"), part("nodes.host.comfy_host")
settings = part("em_core.settings")


class OnMac(torch.Tensor):
    """A tensor of a device that has no float64."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(torch.Tensor) if isinstance(a, OnMac) else a for a in args]
            out = function(*plain, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            return out
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out.as_subclass(OnMac) if isinstance(out, torch.Tensor) else out


def check_schedule() -> None:
    """The schedule's buffer moves with the model; a device without float64 gives the same schedule."""
    expected = families.noise_schedule(MODEL).alphas_cumprod
    sampling = MODEL.get_model_object("model_sampling")
    kept = sampling.sigmas
    try:
        sampling._buffers["sigmas"] = kept.clone().as_subclass(OnMac)
        try:
            sampling.sigmas.double()
        except TypeError:
            found = families.noise_schedule(MODEL).alphas_cumprod
        else:
            raise AssertionError("the stand-in has float64")
    finally:
        sampling._buffers["sigmas"] = kept
    assert type(found) is torch.Tensor and torch.equal(found, expected)


def check_run() -> None:
    """Learning tokens and a LoRA, and finding masks."""
    em = settings.EMSettings(steps=2, e_step_every=2, batch=2, image_side=64, refresh=1,
                             masks=settings.MaskSettings(init_timesteps=2))  # fmt: skip
    joint = settings.JointSettings(kind="lora", steps=1)
    prompt = part("em_core.prompts").ConceptPrompt.parse("a photo of <rex:dog> and <doll> on grass")
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    example = part("em_core.examples").Example(picture, prompt)
    models = families.identify(MODEL, CLIP, VAE)
    learn = part("em_core.runs.learning").learn_concepts
    with hosts.learning_host(models, torch.float32) as host, NoDoubles():
        concepts = learn(host, [example], em, joint)
    host = hosts.ComfyHost(models)
    with NoDoubles():
        part("em_core.runs.finding").find_masks(host, picture, prompt, concepts, em.masks)


MODEL, CLIP, VAE = reduced.unet("sd1"), reduced.clip("sd1"), reduced.vae()
check_schedule()
check_run()
sys.stdout.write("no float64\n")
