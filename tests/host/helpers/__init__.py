"""Nodes of "another pack", for tests alone: they look at values, patch a model, and stand in the way."""

import gc
import hashlib
import json
import os
import time

import folder_paths
import safetensors.torch
import torch


class Anything(str):
    """A socket type that takes every other."""

    def __ne__(self, other):
        return False


def flatten(value, name, found):
    """Every tensor in a value, by path."""
    if isinstance(value, torch.Tensor):
        found[name] = value.detach().clone().contiguous().cpu()
    elif isinstance(value, dict):
        for k, v in value.items():
            flatten(v, f"{name}/{k}", found)
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            flatten(v, f"{name}/{i}", found)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        found[name] = torch.tensor(float(value))
    return found


class TestDump:
    """Writes the tensors in its input to output/<name>.safetensors."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (Anything("*"),), "name": ("STRING", {"default": "x"})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, value, name):
        file = os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors")
        safetensors.torch.save_file(flatten(value, "x", {}), file)
        return {"ui": {"text": [str(value)[:2000]]}}


class TestDumpList(TestDump):
    """The same of a whole list, which ComfyUI would otherwise give one by one."""

    INPUT_IS_LIST = True

    def run(self, value, name):
        return super().run(value, name[0])


class TestModelHash:
    """Hash of all weights, patches and settings of MODEL and CLIP."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "clip": ("CLIP",)},
            "optional": {"after": (Anything("*"),)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")

    def run(self, model, clip, after=None):
        digest = hashlib.sha256()
        for patcher in (model, clip.patcher):
            for name, x in sorted(patcher.model.state_dict().items()):
                original = patcher.backup.get(name)
                x = x if original is None else original.weight
                digest.update(name.encode() + x.detach().float().cpu().numpy().tobytes())
            digest.update(repr(sorted(patcher.patches)).encode())
            digest.update(repr(sorted(patcher.model_options["transformer_options"])).encode())
            hooks = [len(m._forward_hooks) for m in patcher.model.modules()]
            # Not `requires_grad`: v0.8.0 loads weights with it and drops it where it patches them.
            gradients = [p.grad is not None for p in patcher.model.parameters()]
            digest.update(repr((sum(hooks), sum(gradients))).encode())
        return {"ui": {"text": [digest.hexdigest()]}}


class TestHeld:
    """Bytes of all tensors that anything in the process still refers to."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {"after": (Anything("*"),)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    @classmethod
    def IS_CHANGED(cls, **kwargs):
        return float("nan")

    def run(self, after=None):
        gc.collect()
        held = {}
        for x in gc.get_objects():
            if issubclass(type(x), torch.Tensor) and x.layout == torch.strided:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return {"ui": {"text": [str(sum(held.values()))]}}


class TestAttentionPatch:
    """What IPAdapter and its kin do: replaces every cross-attention, chaining what was there before."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "scale": ("FLOAT", {"default": 0.9})}}

    def run(self, model, scale):
        from comfy.ldm.modules.attention import optimized_attention

        extra = torch.linspace(-1, 1, 7)

        def replace(q, k, v, options):
            out = optimized_attention(q, k, v, options["n_heads"])
            return out * scale + extra.mean().to(out)

        patched = model.clone()
        for block in [
            ("input", 1),
            ("input", 3),
            ("middle", 0),
            *[("output", i) for i in range(4)],
        ]:
            patched.set_model_attn2_replace(replace, *block)
        return (patched,)


class TestStockClip:
    """A CLIP with ComfyUI's own tokenizer, which knows nothing of this pack and all words."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def run(self, clip):
        from comfy.sd1_clip import SD1Tokenizer

        stock = clip.clone()
        stock.tokenizer = SD1Tokenizer(
            embedding_directory=clip.tokenizer.clip_l.embedding_directory
        )
        return (stock,)


class TestBrokenPatch:
    """A patch that relies on what only its own sampler brings, and fails without it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        patched = model.clone()
        patched.set_model_attn2_patch(lambda n, context, value, options: options["my_sampler"])
        return (patched,)


class TestOutOfMemory:
    """A patch that reports exhausted memory while gradients are on and the batch is above a limit."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "limit": ("INT", {"default": 4})}}

    def run(self, model, limit):
        patched = model.clone()

        def patch(n, context, value, options):
            if torch.is_grad_enabled() and len(n) > limit:
                raise torch.OutOfMemoryError("test")
            return n, context, value

        patched.set_model_attn2_patch(patch)
        return (patched,)


class TestLoadedOtherwise:
    """MODEL and CLIP as of a loader that gave ComfyUI no way to load them again."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL", "CLIP")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",)}}

    def run(self, model, clip):
        model, clip = model.clone(), clip.clone()
        model.cached_patcher_init = clip.patcher.cached_patcher_init = None
        return model, clip


class TestFault:
    """A patch in which memory runs out after so many passes through a layer, so many times."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        whole = ("INT", {"default": 1, "max": 10**6})
        return {"required": {"model": ("MODEL",), "after": whole, "times": whole, "form": whole}}

    def run(self, model, after, times, form):
        patched, calls = model.clone(), [0]

        def patch(n, context, value, options):
            calls[0] += 1
            if after < calls[0] <= after + times:
                raise self.errors()[form]
            return n, context, value

        patched.set_model_attn2_patch(patch)
        return (patched,)

    def errors(self):
        return (
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            RuntimeError("MPS backend out of memory"),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        )


class TestUnreadable:
    """A patch that holds an open file, which nobody can look into."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def run(self, model):
        patched, file = model.clone(), open(__file__)  # noqa: SIM115

        def patch(x, options):
            return x if file else None

        patched.set_model_attn2_output_patch(patch)
        return (patched,)


class TestSlow:
    """A patch that makes every pass through the UNet take a while, so that it can be interrupted."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "seconds": ("FLOAT", {"default": 0.01})}}

    def run(self, model, seconds):
        patched = model.clone()

        def patch(x, options):
            time.sleep(seconds)
            return x

        patched.set_model_attn2_output_patch(patch)
        return (patched,)


class TestControlNet:
    """A small random ControlNet of the model's shape."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("CONTROL_NET",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "seed": ("INT", {"default": 0})}}

    def run(self, model, seed):
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.ops

        config = dict(model.model.model_config.unet_config)
        for name in ("out_channels", "transformer_depth_output", "disable_unet_model_creation"):
            config.pop(name, None)
        with torch.inference_mode(False):
            net = comfy.cldm.cldm.ControlNet(
                hint_channels=3, device="cpu", operations=comfy.ops.disable_weight_init, **config
            )
            generator = torch.Generator().manual_seed(seed)
            for p in net.parameters():
                p.data = torch.randn(p.shape, generator=generator) * 0.02
        return (
            comfy.controlnet.ControlNet(net, load_device=model.load_device, compression_ratio=8),
        )


class TestClipVision:
    """A small random CLIP_VISION of the kind that Load CLIP Vision gives: CLIP's or DINOv2."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("CLIP_VISION",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (["clip", "dino"],), "seed": ("INT", {"default": 0})}}

    def run(self, kind, seed):
        from comfy.clip_vision import IMAGE_ENCODERS, ClipVisionModel

        config = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "num_channels": 3, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
        }  # fmt: skip
        more = {
            "clip": {"model_type": "clip_vision_model", "projection_dim": 12},
            "dino": {"model_type": "dinov2", "use_swiglu_ffn": False, "image_size": 518},
        }
        os.makedirs(folder_paths.get_temp_directory(), exist_ok=True)
        file = os.path.join(folder_paths.get_temp_directory(), f"{kind}.json")
        with open(file, "w") as out:
            json.dump(config | more[kind], out)
        with torch.inference_mode(False):
            vision = ClipVisionModel(file)
            generator = torch.Generator().manual_seed(seed)
            plain = IMAGE_ENCODERS[more[kind]["model_type"]](
                config | more[kind], torch.float32, "cpu", torch.nn
            )
            names = sorted(name for name, _ in plain.named_parameters())
            weights = plain.state_dict()
            for name in names:
                weights[name] = torch.randn(weights[name].shape, generator=generator) * 0.3
            vision.load_sd(weights)
        return (vision,)


class TestVisionEmbeds:
    """The vectors in what CLIP Vision Encode gives."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", (Anything("*"),)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"output": ("CLIP_VISION_OUTPUT",)}}

    def run(self, output):
        return (output["image_embeds"],)


NODE_CLASS_MAPPINGS = {
    c.__name__: c
    for c in (
        TestDump,
        TestDumpList,
        TestModelHash,
        TestHeld,
        TestAttentionPatch,
        TestStockClip,
        TestBrokenPatch,
        TestOutOfMemory,
        TestLoadedOtherwise,
        TestFault,
        TestUnreadable,
        TestSlow,
        TestControlNet,
        TestClipVision,
        TestVisionEmbeds,
    )
}
