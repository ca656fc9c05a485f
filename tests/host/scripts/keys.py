"""A run's key inside ComfyUI: whatever acts on a graph's models changes it, and nothing else does."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_freelunch import FreeU_V2  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402
from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

families, identity = part("nodes.host.families"), part("nodes.host.identity")
digests = part("em_core.runs.digest")
Example, ConceptPrompt = part("em_core.examples").Example, part("em_core.prompts").ConceptPrompt
PROMPT = "a photo of <rex:old dog> on grass"
UNET = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def key(model: Any = None, clip: Any = None, vae: Any = None, prompt: str = PROMPT) -> str:
    """The digest of these models with the others as they are."""
    models = families.identify(model or MODEL, clip or CLIP, vae or VAE)
    example = Example(torch.zeros(3, 16, 16), ConceptPrompt.parse(prompt))
    return str(identity.models_digest(models, [example]))


def predicting(how: str, zsnr: bool = False) -> Any:
    node = ModelSamplingDiscrete
    run = node.execute if hasattr(node, "execute") else node().patch
    return first(run(MODEL, how, zsnr))


def freed(b1: float) -> Any:
    node = FreeU_V2
    run = node.execute if hasattr(node, "execute") else node().patch
    return first(run(MODEL, b1, 1.4, 0.9, 0.2))


def compiled() -> Any:
    run = getattr(TorchCompileModel, "execute", None) or TorchCompileModel().patch
    return first(run(MODEL, "inductor"))


def first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.result[0]


def replacing(scale: float, extra: torch.Tensor | None = None) -> Any:
    """What IPAdapter and its kin do."""

    def replace(q: Any, k: Any, v: Any, options: Any) -> Any:
        return q * scale if extra is None else q * scale + extra.mean()

    patched = MODEL.clone()
    patched.set_model_attn2_replace(replace, "middle", 0)
    return patched


def mask(changed: bool) -> torch.Tensor:
    """1024x1024 pixels, a fifth of which differs."""
    made = torch.zeros(1024, 1024)
    made[100:300, 1:] = float(changed)
    return made


class Wrapper:
    """A callable object with slots, as faster packs have."""

    __slots__ = ("by",)

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, apply: Any, given: Any) -> Any:
        return apply(given["input"], given["timestep"], **given["c"]) * self.by


def wrapped(by: Any) -> Any:
    patched = MODEL.clone()
    patched.set_model_unet_function_wrapper(by)
    return patched


def holding(held: Any) -> Any:
    """A patch that holds on to something else."""
    patched = MODEL.clone()
    patched.set_model_attn2_output_patch(lambda x, options: x + 0 * bool(held))
    return patched


def lora(value: float, strength: float = 1.0, clip: bool = False) -> Any:
    unet = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj" if clip else unet
    shape = reduced.SMALL["intermediate_size"]
    width = MODEL.model.state_dict()[UNET].shape[0]
    up = (64, 2) if clip else (width, 2)
    down = (2, 64) if clip else (2, shape)
    tensors = {f"{name}.lora_up.weight": torch.full(up, value), f"{name}.lora_down.weight": torch.ones(down),
               f"{name}.alpha": torch.tensor(2.0)}  # fmt: skip
    patched = comfy.sd.load_lora_for_models(MODEL, CLIP, tensors, strength, strength)
    assert len((patched[1].patcher if clip else patched[0]).patches) == 1
    return patched[1] if clip else patched[0]


@contextmanager
def weight_changed(module: torch.nn.Module, place: int = 0) -> Iterator[None]:
    """One element of a module's largest weight is another one."""
    weight = max(module.parameters(), key=lambda p: p.numel()).data.view(-1)
    kept = weight[place].clone()
    weight[place] += 1e-3
    try:
        yield
    finally:
        weight[place] = kept


def skipped(layer: int) -> Any:
    clip = CLIP.clone()
    clip.clip_layer(layer)
    return clip


@contextmanager
def embedding(value: float) -> Iterator[Any]:
    """A CLIP that finds an embedding file with this value."""
    save_file({"emb_params": torch.full((2, 64), value)}, FOLDER / "dog.safetensors")
    clip = CLIP.clone()
    clip.tokenizer = copy.copy(CLIP.tokenizer)
    clip.tokenizer.clip_l = copy.copy(CLIP.tokenizer.clip_l)
    clip.tokenizer.clip_l.embedding_directory = [str(FOLDER)]
    yield clip


def key_with_embedding(value: float, prompt: str) -> str:
    with embedding(value) as clip:
        return key(clip=clip, prompt=prompt)


def key_with_change(module: torch.nn.Module, place: int) -> str:
    with weight_changed(module, place):
        return key()


def changes() -> dict[str, Callable[[], str]]:
    """Ways to get a key, each of them another one."""
    unet, text, vae = MODEL.model.diffusion_model, CLIP.cond_stage_model, VAE.first_stage_model
    return {
        "nothing": key,
        "v_prediction": lambda: key(predicting("v_prediction")),
        "zero terminal SNR": lambda: key(predicting("v_prediction", True)),
        "zero terminal SNR, eps": lambda: key(predicting("eps", True)),
        "first weight": lambda: key_with_change(unet, 0),
        "last weight": lambda: key_with_change(unet, -1),
        "weight of the text encoder": lambda: key_with_change(text, 12_345),
        "weight of the autoencoder": lambda: key_with_change(vae, 777),
        "clip skip": lambda: key(clip=skipped(-2)),
        "lora": lambda: key(lora(0.5)),
        "other lora": lambda: key(lora(0.6)),
        "strength of a lora": lambda: key(lora(0.5, 0.9)),
        "lora of the text encoder": lambda: key(clip=lora(0.5, clip=True)),
        "FreeU": lambda: key(freed(1.3)),
        "other FreeU": lambda: key(freed(1.31)),
        "attention": lambda: key(replacing(0.5)),
        "other attention": lambda: key(replacing(0.6)),
        "mask of attention": lambda: key(replacing(0.5, mask(False))),
        "other mask of attention": lambda: key(replacing(0.5, mask(True))),
        "wrapper": lambda: key(wrapped(Wrapper(0.5))),
        "other wrapper": lambda: key(wrapped(Wrapper(0.6))),
        "another model in a patch": lambda: key(holding(OTHER.model)),
        "another patcher in a patch": lambda: key(holding(replacing_in(OTHER, 0.5))),
        "its patch": lambda: key(holding(replacing_in(OTHER, 0.6))),
        "prompt": lambda: key(prompt="a photo of <rex:old dog> on sand"),
        "embedding": lambda: key_with_embedding(1.0, "a embedding:dog of <rex:dog>"),
        "other embedding": lambda: key_with_embedding(2.0, "a embedding:dog of <rex:dog>"),
        "start from an embedding": lambda: key_with_embedding(1.0, "a <rex:embedding:dog>"),
        "start from another": lambda: key_with_embedding(2.0, "a <rex:embedding:dog>"),
    }


def replacing_in(model: Any, scale: float) -> Any:
    patched = model.clone()
    patched.set_model_attn2_output_patch(lambda x, options: x * scale)
    return patched


def check_changes() -> None:
    ways = changes()
    keys = {name: way() for name, way in ways.items()}
    for name, one in keys.items():
        same = [other for other in keys if keys[other] == one and other != name]
        assert not same, f"{name} has the key of {same}"
        assert ways[name]() == one, f"{name} has another key the second time"


def check_what_does_not_act() -> None:
    """Clones, loading, white space, and what was learned on before."""
    plain = key()
    assert key(MODEL.clone(), CLIP.clone()) == plain
    # A patch that sets what the checkpoint has anyway is a patch all the same.
    assert key(predicting("eps")) == key(predicting("eps"))
    assert key(compiled()) == plain
    assert key(prompt=" a  photo of<rex: old  dog >on\ngrass ") == plain
    patched = lora(0.5)
    before = key(patched), key(predicting("v_prediction"))
    mm.load_models_gpu([patched, CLIP.patcher], force_full_load=True)
    assert key(patched) == before[0], "the key depends on whether the model is loaded"
    mm.unload_all_models()
    sampled = predicting("v_prediction")
    mm.load_models_gpu([sampled], force_full_load=True)
    sampled.pre_run()
    assert key(sampled) == before[1] and key() == plain
    mm.unload_all_models()
    assert key(patched) == before[0] and key() == plain


def check_what_cannot_be_read() -> None:
    with open(__file__) as file:
        for made in (holding(file), holding(i for i in range(2)), wrapped(file.read)):
            try:
                key(made)
            except digests.Unreadable as error:
                assert "an object of the kind" in str(error), error
            else:
                raise AssertionError("it was read")


def check_cancel() -> None:
    """Cancel stops it between two tensors, and is answered by that."""
    mm.interrupt_current_processing()
    try:
        key()
    except mm.InterruptProcessingException:
        key()
    else:
        raise AssertionError("it was not stopped")


with torch.inference_mode():
    MODEL, CLIP, VAE = reduced.unet("sd1"), reduced.clip("sd1"), reduced.vae()
    OTHER = reduced.unet("sd1")
    reduced.randomise(OTHER.model.diffusion_model, torch.float32, 5)
    check_changes()
    check_what_does_not_act()
    check_what_cannot_be_read()
    check_cancel()
    for name in ("nothing", "v_prediction", "FreeU", "wrapper", "mask of attention"):
        sys.stdout.write(f"{name}: {changes()[name]()}\n")
sys.stdout.write("keys are right\n")
