"""Embeddings and LoRAs of other programs as concepts: `imports.py FOLDER`.

What LoadConcepts and ApplyConceptTokens make of a LoRA is compared with core's *Load LoRA* and its
trigger words; what cannot become a concept is refused. Exits with an error where something is not so.
"""

import sys
from pathlib import Path
from typing import Any

folder = Path(sys.argv[1])

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes  # noqa: E402

files, application = part("nodes.files"), part("nodes.host.application")
UserError, Notice = part("em_core.errors").UserError, part("em_core.errors").Notice
for kind in ("loras", "embeddings", "visual_concepts"):
    folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], {".safetensors", ".pt"})
    (folder / kind).mkdir(exist_ok=True)
G = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G) * 0.1


def lora_of(model: Any, clip: Any, way: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 3 on layers of all sorts, in a format that is about."""
    own = model.model.state_dict()
    theirs = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    layers = {f"lora_unet_{n[:-7].replace('.', '_')}" if way == "kohya" else f"unet.{n[:-7]}":
              f"diffusion_model.{o}" for n, o in theirs.items()
              if n.endswith(("attn2.to_k.weight", "ff.net.2.weight", "proj_in.weight", "conv1.weight"))
              and (way == "kohya" or "attn2" in n)}  # fmt: skip
    text = clip.cond_stage_model.state_dict()
    table = {"sdxl": (("te1", "clip_l"), ("te2", "clip_g")), "sd1": (("te", "clip_l"),)}[family]
    for short, encoder in table if way == "kohya" else ():
        name = f"lora_{short}_text_model_encoder_layers_0_mlp_fc1"
        layers[name] = f"{encoder}.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    found = {}
    for name, path in layers.items():
        o, i, *kernel = (own | text)[path].shape
        up, down = random(o, 3, *[1] * len(kernel)), random(3, i, *kernel)
        if way == "kohya":
            found |= {f"{name}.lora_up.weight": up.bfloat16(), f"{name}.lora_down.weight": down.half(),
                      f"{name}.alpha": torch.tensor(1.5)}  # fmt: skip
        else:
            name = name.replace(".to_k", ".processor.to_k") if way == "old diffusers" else name
            ends = (".lora_B", ".lora_A") if way == "peft" else ("_lora.up", "_lora.down")
            found |= {f"{name}{ends[0]}.weight": up, f"{name}{ends[1]}.weight": down}
    return found


def write(name: str, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, folder / f"{name}.safetensors")
    return f"{name}.safetensors"


def loaded(name: str, **given: Any) -> Any:
    return files.LoadConcepts.execute(name, **given).args[0]


def weights_of(patcher: Any) -> dict[str, torch.Tensor]:
    mm.load_models_gpu([patcher], force_full_load=True)
    found = {name: x.clone() for name, x in patcher.model.state_dict().items()}
    mm.unload_all_models()
    return found


def encoded(clip: Any, text: str) -> torch.Tensor:
    return nodes.CLIPTextEncode().encode(clip, text)[0][0][0].clone()


def check_lora(name: str, model: Any, clip: Any, words: str) -> Any:
    """ApplyConceptTokens of the import gives what Load LoRA gives, and <it> what its words do."""
    concepts = loaded(name, concept="it", words=words, model=model, clip=clip)
    file = folder / "visual_concepts" / "again.safetensors"
    concepts.save(file)
    concepts = loaded("again.safetensors")
    ours = application.apply_concepts(model, clip, concepts, 1.0)
    stock = nodes.LoraLoader().load_lora(model, clip, known_to_core(name), 1.0, 1.0)
    effect = 0.0
    for a, b, plain in (
        (ours[0], stock[0], model),
        (ours[1].patcher, stock[1].patcher, clip.patcher),
    ):
        first, second, third = weights_of(a), weights_of(b), weights_of(plain)
        for key in (k for k in third if "token_embedding" not in k):
            torch.testing.assert_close(first[key], second[key], atol=1e-6, rtol=1e-5)
            effect = max(effect, float((first[key] - third[key]).abs().max()))
    assert effect > 0.01, effect
    ours_x, stock_x = encoded(ours[1], "a photo of <it>"), encoded(stock[1], f"a photo of {words}")
    torch.testing.assert_close(ours_x, stock_x, atol=1e-5, rtol=0)
    return concepts


def known_to_core(name: str) -> str:
    """The file, or one with the names of diffusers' former form, which core alone knows."""
    if "peft" not in name:
        return name.partition("/")[2]
    tensors = load_file(folder / name)
    return write(
        "loras/renamed", {n.replace(".to_k", ".processor.to_k"): x for n, x in tensors.items()}
    )[6:]


def check_ours(model: Any, clip: Any) -> None:
    """Our own file for ComfyUI gives its tokens back by its trigger words."""
    widths = part("nodes.host.families").encoder_widths(clip)
    identity = part("em_core.exchange.importing").unknown_model(family, widths)
    vectors = {"rex": {e: random(2, w) for e, w in widths.items()}}
    Concept = part("em_core.prompts").Concept
    layer = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    width = sum(widths.values())
    weights = {f"{layer}.lora_down": random(2, width), f"{layer}.lora_up": random(64, 2)}
    kind = part("em_core.runs.concept_set").ConceptSet
    concepts = kind((Concept("rex"),), vectors, identity, weights, 0.5)
    files.save_concepts(concepts, "ours", True, True, clip)
    back = check_lora("loras/ours.safetensors", model, clip, "sks ohwx")
    for encoder, v in vectors["rex"].items():
        torch.testing.assert_close(back.vectors["it"][encoder], v, atol=1e-6, rtol=1e-5)
    refused(
        "loras/ours_lora.safetensors", "has no pieces|which does not tell", model, clip, words=" "
    )


def refused(name: str, message: str, model: Any = None, clip: Any = None, **given: Any) -> None:
    import re

    given = {"concept": "it", "words": "sks"} | given
    try:
        loaded(name, model=model, clip=clip, **given)
    except UserError as error:
        assert re.search(message, str(error)), str(error)
        return
    raise AssertionError(f"{name} is taken")


def check_refusals(model: Any, clip: Any) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    whole = {f"{layer}.lora_up.weight": random(64, 2), f"{layer}.lora_down.weight": random(2, 64)}
    bad = {
        "loha": ({f"{layer}.hada_w1_a": random(64, 2), f"{layer}.hada_w1_b": random(2, 64),
                  f"{layer}.hada_w2_a": random(64, 2), f"{layer}.hada_w2_b": random(2, 64)}, "got loha"),
        "dora": (whole | {f"{layer}.dora_scale": random(64, 1)}, "DoRA"),
        "half": ({f"{layer}.lora_up.weight": random(64, 2)}, "is incomplete"),
        "other": (whole | {f"{layer}.lora_down.weight": random(2, 96)}, "different family"),
        "flux": ({n.replace(layer, "transformer.single_blocks.0.linear1"): x for n, x in whole.items()},
                 "fits no layer"),
        "none": ({"model.diffusion_model.out.2.weight": random(3, 3)}, "holds no LoRA"),
        "nan": ({n: x / 0 for n, x in whole.items()}, "not finite"),
    }  # fmt: skip
    for name, (tensors, message) in bad.items():
        refused(f"loras/{write(f'loras/{name}', tensors)[6:]}", message, model, clip)
    write("loras/fine", whole)
    refused("loras/fine.safetensors", "Connect the MODEL and CLIP")
    refused("loras/fine.safetensors", "which does not tell", model, clip, concept="")
    refused("loras/fine.safetensors", "Bad concept name", model, clip, concept="1 2")
    data = (folder / "loras" / "fine.safetensors").read_bytes()
    (folder / "loras" / "cut.safetensors").write_bytes(data[:-8])
    refused("loras/cut.safetensors", "not a complete safetensors file", model, clip)
    torch.save(whole, folder / "loras" / "old.pt")
    refused("loras/old.pt", "pickled file", model, clip)


def check_embeddings(model: Any, clip: Any) -> None:
    """Found by <name>, and what core's own `embedding:` makes of the same file."""
    v = random(2, 64)
    write("embeddings/some dog", {"emb_params": v})
    concepts = loaded("embeddings/some dog.safetensors")
    assert concepts.names == ("some_dog",) and torch.equal(
        concepts.vectors["some_dog"]["clip_l"], v
    )
    ours = application.apply_concepts(model, clip, concepts, 1.0)[1]
    clip.tokenizer.clip_l.embedding_directory = [str(folder / "embeddings")]
    write("embeddings/dog", {"emb_params": v})
    same = encoded(clip, "a photo of embedding:dog"), encoded(ours, "a photo of <some_dog>")
    assert torch.equal(*same)


def check_partly(model: Any, clip: Any) -> None:
    """Layers that this checkpoint does not have are left out, and said."""
    import warnings

    tensors = lora_of(model, clip, "kohya") | {"lora_unet_strange.lora_up.weight": random(4, 4)}
    write("loras/partly", tensors)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        part("nodes.host.imports").concept_of_lora(
            folder / "loras" / "partly.safetensors", "it", "sks", model, clip
        )
    assert any("1 of" in str(w.message) and "lora_unet_strange" in str(w.message) for w in told)


with torch.inference_mode():
    for family in ("sd1", "sdxl"):
        model, clip = reduced.unet(family), reduced.clip(family)
        for way in ("kohya", "peft", "old diffusers"):
            write(f"loras/{way}", lora_of(model, clip, way))
            check_lora(f"loras/{way}.safetensors", model, clip, "red dog")
        check_ours(model, clip)
        check_partly(model, clip)
        if family == "sd1":
            check_refusals(model, clip)
            check_embeddings(model, clip)
        sys.stdout.write(f"{family} is fine\n")
