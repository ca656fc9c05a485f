"""How memory is spent on small random models: frozen layers, texts, copies, plans, and running out of it."""

import ctypes
import gc
import logging
import math
import sys
import tempfile
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import reduced
from inside import import_pack, part

import_pack()

import comfy.model_management as mm  # noqa: E402
import torch  # noqa: E402

GIB = 2**30
HOST, PLANS = part("nodes.host.comfy_host"), part("em_core.model.plans")
FLOW, SETTINGS = part("nodes.learning.flow"), part("em_core.settings")
ERRORS, FROZEN = part("em_core.errors"), part("em_core.model.frozen")
MEMORY, PROMPTS = part("em_core.model.memory"), part("em_core.prompts")
PROMPT = PROMPTS.ConceptPrompt.parse("a photo of <rex:dog> and <doll:doll> on grass")


def models_of(family: str, weights: str = "fp32", text: torch.dtype = torch.float32) -> Any:
    made = reduced.unet(family, weights), reduced.clip(family, text), reduced.vae()
    return part("nodes.host.families").identify(*made)


def vectors_of(host: Any, **more: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    return {
        name: {
            encoder: v.clone().requires_grad_(**more)
            for encoder, v in host.initial_vectors("", 1, generator).items()
        }
        for name in PROMPT.names
    }


def check_texts() -> None:
    """Texts in one call are what each is alone, pooled vectors too, with weights and of any length."""
    with HOST.learning_host(models_of("sdxl"), torch.float32) as host, torch.no_grad():
        vectors = vectors_of(host, requires_grad=False)
        long = PROMPTS.ConceptPrompt.parse("a photo of <rex:dog>" + ", a cat" * 60)
        weighted = PROMPTS.ConceptPrompt(("a (red:1.4) photo of ", *PROMPT.parts[1:]))
        texts = [PROMPT, PROMPT.subset(("doll",)), weighted, PROMPT]
        together = host.encode_prompts(texts, vectors)
        for i, text in enumerate(texts):
            alone = host.encode_prompts([text], vectors)
            for name, value in alone.inputs.items():
                torch.testing.assert_close(together.inputs[name][i : i + 1], value)
            assert together.streams["text"].columns[i] == alone.streams["text"].columns[0]
        both = host.encode_prompts([long, PROMPT], vectors)
        alone = host.encode_prompts([long], vectors)
        assert both.inputs["y"].shape[1] > 77
        for name, value in alone.inputs.items():
            torch.testing.assert_close(both.inputs[name][:1], value)


def gradient(models: Any, storage: torch.dtype | None, plain: bool) -> tuple[Any, int]:
    """The vectors' gradient of a pass, and the bytes that the UNet's pass keeps for it."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with HOST.learning_host(models, torch.float32, None, storage) as host:
        if plain:
            for module in (*host.unet.modules(), *host.clip.cond_stage_model.modules()):
                module.__dict__.pop("forward", None)
        vectors = vectors_of(host)
        Z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        conditioning = host.encode_prompts([PROMPT] * 2, vectors)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = host.predict(Z, torch.tensor([50.0, 700.0]), conditioning)
        for weight in host.unet.parameters():
            kept.pop(weight.untyped_storage().data_ptr(), None)
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        kept.clear()
        out.square().mean().backward()
        return [v.grad for of in vectors.values() for v in of.values()], held


def check_frozen_layers() -> None:
    """Gradients are bit for bit those of ComfyUI's own layers, for less that is kept."""
    for family, text, storage in (
        ("sd1", torch.float32, None),
        ("sd1", torch.float16, torch.float8_e4m3fn),
        ("sdxl", torch.float16, torch.float8_e4m3fn),
    ):
        models = models_of(family, text=text)
        (expected, before), (found, after) = (gradient(models, storage, p) for p in (True, False))
        for a, b in zip(expected, found, strict=True):
            assert a.abs().max() > 0 and torch.equal(a, b), (family, storage, (a - b).abs().max())
        assert after < (0.95 if storage is None else 0.7) * before, (family, storage, before, after)


def check_copies() -> None:
    """They are gone when the context ends, matrices rest in fp8, and what was loaded anew is no
    further copied."""
    models = models_of("sdxl", text=torch.float16)
    gc.collect()
    with HOST.learning_host(models, torch.bfloat16, None, torch.float8_e4m3fn) as host:
        host.load()
        kinds = {(w.ndim > 1, w.dtype) for w in host.unet.parameters()}
        assert kinds == {(True, torch.float8_e4m3fn), (False, torch.bfloat16)}, kinds
        gone = [weakref.ref(host.unet), weakref.ref(host.clip.cond_stage_model)]
        parts = [weakref.ref(p) for p in host.unet.parameters()]
    del host
    gc.collect()
    assert not any(ref() is not None for ref in (*gone, *parts))

    generator = torch.Generator()  # as when a run goes on in this phase
    with HOST.learning_host(models, torch.float32) as host, host.trainable("lora", {}, generator):
        assert host.loaded


def check_kept_on_the_cpu() -> None:
    """A CLIP that stays loaded, since ComfyUI frees a card alone, is copied without its LoRA in the weights:
    the copy, which has the LoRA as a patch too, would have it twice."""
    models = models_of("sd1")
    patched = models.clip.clone()
    key = next(
        name for name in models.clip.patcher.model.state_dict() if name.endswith("q_proj.weight")
    )
    before = models.clip.patcher.model.state_dict()[key].clone()
    patched.patcher.add_patches({key: ("diff", (torch.ones_like(before),))}, 1.0)
    mm.load_models_gpu([patched.patcher], force_full_load=True)
    assert torch.equal(patched.patcher.model.state_dict()[key], before + 1)
    real, mm.unload_all_models = mm.unload_all_models, lambda: None  # as for a model on the CPU
    try:
        with HOST.learning_host(replace(models, clip=patched), torch.float32) as host:
            for _ in range(2):
                host.load()
                weight = host.clip.patcher.model.state_dict()[key]
                torch.testing.assert_close(weight, before + 1)
                with host.vae_in_use():
                    pass
    finally:
        mm.unload_all_models = real


def check_users_vae() -> None:
    """It is loaded and taken off the device in inference mode, as it was made and will be used: weights that
    were moved outside of it fail in the next graph. What it gives is an ordinary tensor."""
    with torch.inference_mode():
        models = models_of("sd1")
    modes, encode, decode = [], models.vae.encode, models.vae.decode

    def noting(run: Any) -> Any:
        def noted(x: torch.Tensor) -> torch.Tensor:
            loaded = [of.model for of in mm.current_loaded_models]
            modes.append((torch.is_inference_mode_enabled(), host.model in loaded))
            for weight in models.vae.first_stage_model.parameters():
                weight.data = weight.data.clone()  # as on the way to a card
            return run(x)

        return noted

    models.vae.encode, models.vae.decode = noting(encode), noting(decode)
    generator = torch.Generator().manual_seed(0)
    with HOST.learning_host(models, torch.float32) as host, torch.no_grad():
        host.load()
        latent = host.encode_image(torch.zeros(1, 3, 64, 64))
        vectors = {name: host.initial_vectors("dog", 1, generator) for name in PROMPT.names}
        host.draw(PROMPT, vectors, [1, 2], steps=1)
        assert models.vae.patcher not in [of.model for of in mm.current_loaded_models]
    assert modes == [(True, False)] * 3 and not latent.is_inference(), modes
    with torch.inference_mode():
        assert torch.isfinite(decode(latent)).all()


def check_paged() -> None:
    """What newer ComfyUI pages in layer by layer is loaded anew; where no loader can do that, it is copied,
    without what paging has left on its modules, and the original keeps it."""
    anew, taken = reduced.unet("sd1"), []

    class Paged(type(anew)):  # type: ignore[misc]
        """A patcher whose clone is loaded anew, or takes the module that it is given."""

        def is_dynamic(self) -> bool:
            return True

        def clone(self, disable_dynamic: bool = False, model_override: Any = None) -> Any:
            assert disable_dynamic
            taken.append(model_override)
            if model_override is None:
                return anew
            return type(anew)(model_override[0], self.load_device, self.offload_device)

    paged = Paged(reduced.unet("sd1").model, mm.get_torch_device(), torch.device("cpu"))
    paged.cached_patcher_init = (object, ())
    private = part("nodes.host.copies").private_model
    own = private(paged, torch.bfloat16, None)
    assert own.model is anew.model and own.model is not paged.model and taken == [None]
    assert all(w.dtype == torch.bfloat16 for w in own.model.diffusion_model.parameters())

    paged.cached_patcher_init, block = None, paged.model.diffusion_model.input_blocks[1][1]
    pointer = ctypes.pointer(ctypes.c_int(1))  # no copy of one can be made
    paged.model.dynamic_pins = block._pin_state = block._v = block._prefetch = pointer
    block.proj_in.comfy_cast_weights = True
    own = private(paged, torch.bfloat16, None)
    (twin, backups) = taken[-1]
    assert own.model is twin and twin is not paged.model and not any(backups)
    copied = twin.diffusion_model.input_blocks[1][1]
    assert not any(hasattr(copied, name) for name in ("_v", "_pin_state", "_prefetch"))
    assert not hasattr(twin, "dynamic_pins")
    assert "comfy_cast_weights" not in vars(copied.proj_in)
    assert block._v is pointer and block.proj_in.comfy_cast_weights is True
    for (name, a), b in zip(twin.named_parameters(), paged.model.parameters(), strict=True):
        assert a is not b and torch.equal(a.float(), b.to(a.dtype).float()), name


def check_demo_loader() -> None:
    """The demo model's MODEL and CLIP can be loaded again, without paging, as ComfyUI asks for it."""
    model, clip, _ = part("nodes.host.demo_model").load_demo_model(
        part("em_core.demo").model_path()
    )
    for patcher in (model, clip.patcher):
        load, given = patcher.cached_patcher_init[:2]
        again = load(
            *given, **({"disable_dynamic": True} if hasattr(patcher, "is_dynamic") else {})
        )
        assert again.model is not patcher.model
        pairs = zip(
            again.model.state_dict().items(), patcher.model.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for (_, a), b in pairs)


ANATOMY, ANATOMY_OF = part("nodes.host.anatomy").anatomy, part("em_core.model.anatomy")


def names(tries: list[Any]) -> list[tuple[str, int]]:
    return [(one.plan.name, one.batch) for one in tries]


def check_choice() -> None:
    """Which plans there are for whom, and which one is taken for how much free memory."""
    job, whole_body = ANATOMY_OF.Job(128, 128, batch=4, texts=2), ANATOMY(models_of("sdxl"))
    # At this size, encoding a picture takes more than the narrow UNet; this autoencoder is narrower.
    body = replace(whole_body, autoencoder=replace(whole_body.autoencoder, channels=1))
    card, old = PLANS.Device(torch.bfloat16, True), PLANS.Device(None, True)
    nothing, lora = SETTINGS.JointSettings(), SETTINGS.JointSettings(kind="lora")
    whole, cpu = SETTINGS.JointSettings(kind="full"), PLANS.Device(None, False)

    def tries(joint: Any, device: Any, name: str = "automatic") -> list[Any]:
        plans = PLANS.choose(name, joint, device)
        return list(
            PLANS.attempts(plans, device, lambda dtype: body, replace(job, kind=joint.kind))
        )

    half = [("half", 4), *(("half, recomputing", n) for n in (4, 2, 1)), ("fp8, recomputing", 1)]
    wide = [("float32", 4), *(("float32, recomputing", n) for n in (4, 2, 1))]
    assert names(tries(nothing, card)) == names(tries(lora, card)) == half
    assert names(tries(whole, card)) == names(tries(nothing, cpu)) == wide
    assert names(tries(nothing, old)) == [*wide, half[-1]]
    assert names(tries(nothing, card, "float32")) == wide + half
    assert names(tries(nothing, cpu, "half")) == wide
    assert names(tries(nothing, cpu, "fp8, recomputing")) == wide[1:]
    no_fp8 = PLANS.Device(torch.bfloat16, False)
    assert names(tries(nothing, no_fp8, "fp8, recomputing")) == half[1:4]
    every = tries(lora, card)
    assert [one.dtype for one in every] == [torch.bfloat16] * 5
    assert every[-1].storage == torch.float8_e4m3fn and every[-1].loss_scale == 1
    scaled = tries(lora, PLANS.Device(torch.float16, False))
    assert {one.loss_scale for one in scaled} == {2.0**16} and len(scaled) == 4
    needs = [one.need.device for one in every]
    assert needs == sorted(needs, reverse=True)
    for i, need in enumerate(needs):
        assert PLANS.first_that_fits(every, need) == needs.index(need) <= i
        assert (
            needs[PLANS.first_that_fits(every, math.nextafter(need, 0))] < need or need == needs[-1]
        )
    assert PLANS.first_that_fits(every, 0.0) == 4
    large = [replace(one, need=replace(one.need, encoding=1e12)) for one in every]
    assert {one.need.peak for one in large} == {1e12} and PLANS.first_that_fits(large, 0.0) == 4
    assert names(PLANS.smaller(every, every[1])) == half[2:]
    try:
        PLANS.choose("half", whole, card)
        raise AssertionError("not refused")
    except ERRORS.UserError as error:
        assert "does not fit" in str(error) and "float32" in str(error)
    said = MEMORY.describe("SDXL, LoRA", 9.8 * GIB, 11.2 * GIB)
    assert said == "SDXL, LoRA: 9.8 GB of 11.2 GB free"


def forms_of_exhaustion() -> list[Exception]:
    found: list[Exception] = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
    ]
    if hasattr(torch, "AcceleratorError"):
        found.append(torch.AcceleratorError("CUDA error: out of memory"))
    wrapped = ValueError("a pack's own words")
    wrapped.__cause__ = found[0]
    return [*found, wrapped]


def check_exhaustion() -> None:
    """Every form of it leads to the next plan, from the step that was reached; nothing else does."""
    em = SETTINGS.EMSettings(steps=8, e_step_every=4, batch=2, image_side=128, refresh=1,
                             masks=SETTINGS.MaskSettings(init_timesteps=2, crf=None))  # fmt: skip
    picture = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
    example = part("em_core.examples").Example(picture, PROMPT)
    truth = {name: torch.zeros(128, 96, dtype=torch.bool) for name in PROMPT.names}
    truth["rex"][:64], truth["doll"][64:] = True, True
    em, example = replace(em, mode="given"), replace(example, masks=truth)
    request = FLOW.Request(models_of("sd1"), (example,), em, SETTINGS.JointSettings(), "automatic")
    for number, error in enumerate(forms_of_exhaustion()):
        steps, told = run_failing(request, number, {2: error, 5: error})
        # Steps 3 and 6 fail once each; none is taken twice, and all are taken.
        assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 8], (error, steps)
        plans = [text.partition("memory plan ")[2].partition(")")[0] for text in told]
        assert plans == ["float32", "float32, recomputing", "float32, recomputing"], told
        assert "Samples per step: 1 instead of 2." in told[2]
    try:
        run_failing(request, 100, {2: RuntimeError("a bug")})
        raise AssertionError("a bug was taken for exhausted memory")
    except RuntimeError as error:
        assert str(error) == "a bug"
    try:
        run_failing(request, 101, dict.fromkeys(range(9), forms_of_exhaustion()[0]), again=True)
        raise AssertionError("there was no end")
    except ERRORS.UserError as error:
        assert "float32, recomputing and 1 sample" in str(error)


def run_failing(
    request: Any, number: int, errors: dict[int, Exception], again: bool = False
) -> tuple[list[int], list[str]]:
    """The steps of a run and what the node says; each error comes once, after so many steps, or always."""
    loop, steps, left = part("em_core.method.loop"), [], dict(errors)
    m_step, progress = loop.m_step, FLOW.NodeProgress.__call__

    def failing(problem: Any, state: Any, first: bool) -> Any:
        if state.step in left:
            raise left[state.step] if again else left.pop(state.step)
        return m_step(problem, state, first)

    def noting(self: Any, event: Any, state: Any) -> None:
        steps.append(event.step)

    loop.m_step, FLOW.NodeProgress.__call__ = failing, noting
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            FLOW.run_store = lambda: part("em_core.runs.store").RunStore(Path(folder))
            FLOW.fulfil(request)
    finally:
        loop.m_step, FLOW.NodeProgress.__call__ = m_step, progress
    said = [str(w.message) for w in told if issubclass(w.category, ERRORS.MemoryNotice)]
    return steps, said


def check_preview() -> None:
    """All pictures are drawn at one size, and they are made small once."""
    module, states = part("nodes.learning.progress"), part("em_core.method.state")
    em, joint = SETTINGS.EMSettings(), SETTINGS.JointSettings()
    examples, prompts = part("em_core.examples"), part("em_core.prompts")
    prompt = prompts.ConceptPrompt.parse("a photo of <rex:star>")
    example = examples.Example(torch.rand(3, 768, 1024), prompt)
    shown = module.NodeProgress((example, example), em, joint)
    labels = torch.zeros(1, 768, 1024, dtype=torch.bool)
    labels[:, 100:600, 200:900] = True
    blank = torch.zeros(1, 4, 4)
    picture = states.PictureState(
        blank, blank, blank[0, 0, :1], labels.float(), labels, labels[:, 0, 0]
    )
    state = states.RunState({}, torch.Generator().get_state(), (picture, picture))
    kind, image, _ = shown.preview(state)
    assert kind == "JPEG" and shown.preview(state) is None
    assert [of.shape[-2:] for of in shown.strip.pictures] == [(240, 320)] * 2 and image.width > 640
    strip, shown.shown = shown.strip, 0.0
    assert shown.preview(state) is not None and shown.strip is strip
    check_share_of_previews(module, shown, state)


def check_share_of_previews(module: Any, shown: Any, state: Any) -> None:
    """What takes a tenth of a second to draw is drawn every five seconds, a fiftieth of the time."""
    now, real = [1000.0], (module.time, module.Strip.draw)

    def slow(*args: Any) -> Any:
        now[0] += 0.1
        return real[1](*args)

    module.time, module.Strip.draw = SimpleNamespace(monotonic=lambda: now[0]), slow
    try:
        drawn, shown.shown, shown.took = 0, 0.0, 0.0
        for _ in range(1000):
            now[0] += 0.05
            drawn += shown.preview(state) is not None
    finally:
        module.time, module.Strip.draw = real
    assert 9 <= drawn <= 11, drawn


logging.disable(logging.WARNING)
with torch.inference_mode():
    for check in (check_choice, check_preview, check_exhaustion):
        check()
    with torch.inference_mode(False):
        for check in (
            check_texts, check_frozen_layers, check_copies, check_kept_on_the_cpu, check_users_vae,
            check_paged, check_demo_loader,
        ):  # fmt: skip
            check()
sys.stdout.write("all is fine\n")
