"""One LoRA file with the tokens in it, through core's own nodes: `stock.py FOLDER FAMILY ...`.

Each family's text encoders and UNet are ComfyUI's own classes, reduced, with random weights. What the
saved file gives is compared with what ApplyConceptTokens gives. Exits with an error where it differs.
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

folder, families = Path(sys.argv[1]), sys.argv[2:]

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import nodes  # noqa: E402

files, application = part("nodes.files"), part("nodes.host.application")
names = part("em_core.exchange.names")
for kind in ("loras", "embeddings", "visual_concepts"):
    folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], {".safetensors"})
TEXTS = (
    "a photo of <rex>",
    "<doll>, a photo, (<rex>:1.3), (on grass:0.8)",
    " and ".join(["a photo of <rex>", *["a red star on sand"] * 20, "(<doll>:1.2)", "end"]),
)
said: list[str] = []


class Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


def learned(models: Any, given: dict[str, int], seed: int) -> Any:
    """Concepts with so many random vectors each, and a LoRA on all layers."""
    g = torch.Generator().manual_seed(seed)
    host = part("nodes.host.comfy_host").ComfyHost(models)
    vectors = {
        name: {e: torch.randn(n, width, generator=g) * 0.3 for e, width in models.encoders.items()}
        for name, n in given.items()
    }
    lora = part("em_core.model.adapters").init_lora(host.adaptable_layers(), 2, g)
    weights = {
        n: x.detach() if n.endswith("down") else torch.randn(x.shape, generator=g) * 0.2
        for n, x in lora.items()
    }
    Concept = part("em_core.prompts").Concept
    return part("em_core.runs.concept_set").ConceptSet(
        concepts=tuple(Concept(name) for name in given), vectors=vectors,
        identity=host.identity(), weights=weights, lora_scale=0.5,
    )  # fmt: skip


def encoded(clip: Any, text: str) -> list[torch.Tensor]:
    ((cond, extra),) = nodes.CLIPTextEncode().encode(clip, text)[0]
    pooled = extra.get("pooled_output")
    return [x.clone() for x in (cond, pooled) if x is not None]


def stock_text(text: str, triggers: dict[str, tuple[str, ...]]) -> str:
    for name, words in triggers.items():
        text = text.replace(f"<{name}>", " ".join(words))
    return text


def weights_of(patcher: Any) -> dict[str, torch.Tensor]:
    """The weights as they are once all patches are in them."""
    mm.load_models_gpu([patcher], force_full_load=True)
    found = {name: x.clone() for name, x in patcher.model.state_dict().items()}
    mm.unload_all_models()
    return found


def same(ours: Any, stock: Any, what: str, tolerance: float = 1e-5) -> float:
    """The largest difference of two lists of tensors."""
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, stock, strict=True))
    assert worst <= tolerance, f"{family}, {what}: differs by {worst:.1e}"
    return worst


def load(name: str, model: Any, clip: Any, strength: float = 1.0, text: float = 1.0) -> Any:
    return nodes.LoraLoader().load_lora(model, clip, f"{name}.safetensors", strength, text)


def run() -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    model, clip = reduced.unet(family), reduced.clip(family)
    models = part("nodes.host.families").identify(model, clip, reduced.vae())
    before = {n: x.clone() for n, x in model.model.state_dict().items()}
    before_text = {n: x.clone() for n, x in clip.cond_stage_model.state_dict().items()}
    concepts = learned(models, {"rex": 1, "doll": 3}, 0)
    guide = files.save_concepts(concepts, "two", True, True, clip)
    triggers = {"rex": ("sks",), "doll": ("ohwx", "hns", "bsf")}
    assert "`sks` means rex, `ohwx hns bsf` means doll" in guide, guide
    check_names(model)
    check_strengths(model, clip, concepts, triggers)
    save_changes(model, clip, concepts)
    check_with_others(models, concepts, triggers)
    check_model_only(model, clip)
    check_half_precision(models, concepts, triggers)
    mm.unload_all_models()
    for module, kept in ((model.model, before), (clip.cond_stage_model, before_text)):
        now = module.state_dict()
        assert all(torch.equal(now[n], x) for n, x in kept.items()) and len(now) == len(kept)


def check_names(model: Any) -> None:
    """Layers' names in kohya's files are core's own, where these are diffusers'."""
    theirs = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    ours = {f"diffusion_model.{name}" for name in theirs.values()}
    named = {own: name for name, own in theirs.items()}
    blocks = names.blocks_per_level([f"{name}." for name in ours])
    for path in model.model.state_dict():
        own = path.removeprefix("diffusion_model.")
        if own in named and "_block" in own:
            layer, _, end = path.rpartition(".")
            found = f"{names.diffusers_path(layer, blocks)}.{end}"
            assert found == named[own], (own, found, named[own])
    (folder / f"{family}.json").write_text(json.dumps(theirs))


def check_strengths(model: Any, clip: Any, concepts: Any, triggers: Any) -> None:
    """Strength 1 is ApplyConceptTokens', 0 the plain trigger, 0.5 half way between; no key is left over."""
    said.clear()
    ours_model, ours = application.apply_concepts(model, clip, concepts, 1.0)
    stock_model, stock = load("two", model, clip)
    for text in TEXTS:
        plain = stock_text(text, triggers)
        worst = same(encoded(ours, text), encoded(stock, plain), "the prompt")
        sys.stdout.write(f"{family}: encoded prompt within {worst:.1e}\n")
        effect = (encoded(stock, plain)[0] - encoded(clip, plain)[0]).abs().max()
        assert effect > 0.1, "the file does nothing"
        zero = load("two", model, clip, 1.0, 0.0)[1]
        assert all(map(torch.equal, encoded(zero, plain), encoded(clip, plain)))
        for skip in (-2, -3):
            skipped = [nodes.CLIPSetLastLayer().set_last_layer(c, skip)[0] for c in (ours, clip)]
            above = load("two", model, skipped[1])[1]
            same(encoded(skipped[0], text), encoded(above, plain), f"clip skip {skip}")
    a, b = weights_of(ours_model), weights_of(stock_model)
    same([a[n] for n in a], [b[n] for n in a], "the UNet", 0.0)
    assert not [line for line in said if "not loaded" in line.lower()], said
    halfway = replace(concepts, weights={}, vectors=moved(clip, concepts, triggers, 0.5))
    tokens = replace(concepts, weights={})
    files.save_concepts(tokens, "tokens", True, True, clip, "rex: sks, doll: ohwx hns bsf")
    half = load("tokens", model, clip, 0.5, 0.5)[1]
    ours = application.apply_concepts(model, clip, halfway, 1.0)[1]
    same(encoded(ours, TEXTS[1]), encoded(half, stock_text(TEXTS[1], triggers)), "half strength")
    (folder / "loras" / "tokens.safetensors").unlink()


def moved(clip: Any, concepts: Any, triggers: Any, share: float) -> Any:
    """The vectors at a share of the way from their triggers' own rows."""
    tables = {
        e: getattr(clip.cond_stage_model, e).transformer.get_input_embeddings().weight.clone()
        for e in concepts.identity.encoders
    }
    vocabulary = part("nodes.host.text").vocabularies(clip, tables)
    return {
        name: {
            e: torch.lerp(tables[e][[vocabulary[e].pieces(w)[0] for w in triggers[name]]], v, share)
            for e, v in of.items()
        }
        for name, of in concepts.vectors.items()
    }


def check_with_others(models: Any, concepts: Any, triggers: Any) -> None:
    """Two such files together, in either order, and above a LoRA of someone else."""
    model, clip = models.model, models.clip
    more = learned(models, {"max": 2}, 7)
    guide = files.save_concepts(more, "one", True, True, clip)
    assert "`gsc snf` means max" in guide, guide
    triggers = {**triggers, "max": ("gsc", "snf")}
    text = "a photo of <rex> and <max> with <doll>"
    plain = stock_text(text, triggers)
    ours = application.apply_concepts(model, clip, concepts, 1.0)
    ours = application.apply_concepts(*ours, more, 1.0)
    for order in (("two", "one"), ("one", "two")):
        stock = load(order[1], *load(order[0], model, clip))
        same(encoded(ours[1], text), encoded(stock[1], plain), "two files")
    other = load("one_lora", model, clip)
    ours = application.apply_concepts(*other, concepts, 1.0)
    stock = load("two", *other)
    same(encoded(ours[1], TEXTS[1]), encoded(stock[1], stock_text(TEXTS[1], triggers)), "above")
    encoded(
        stock[1], plain
    )  # while a file's tokens stand in the table, rows are still the checkpoint's
    again = files.save_concepts(concepts, "again", True, True, stock[1])
    assert "`sks` means rex" in again
    first, second = (load_file(folder / "loras" / f"{n}.safetensors") for n in ("two", "again"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def save_changes(model: Any, clip: Any, concepts: Any) -> None:
    """All weights changed, as factors for other programs and whole for ComfyUI, which takes both."""
    g = torch.Generator().manual_seed(5)
    weights, low = {}, part("em_core.exchange.low_rank")
    host = part("nodes.host.layers")
    named = host.taking_part(host.named_weights(model.model.diffusion_model, clip.cond_stage_model))
    for name, weight in named.items():
        x = torch.randn(weight.shape, generator=g) * 0.05
        fitting = low.takes_factors(f"{name}.diff", x)
        weights[f"{name}.diff"] = x if fitting else torch.zeros_like(x)
    changed = replace(concepts, weights=weights, lora_scale=1.0)
    said.clear()
    files.save_concepts(changed, "full", True, True, clip, "rex: sks, doll: ohwx hns bsf", 4096)
    found = [load(name, model, clip) for name in ("full", "full_lora")]
    assert not [line for line in said if "not loaded" in line.lower()], said
    for whole, factors in zip(*found, strict=True):
        a, b = (weights_of(getattr(one, "patcher", one)) for one in (whole, factors))
        tables = [n for n in a if "token_embedding" not in n]
        same([a[n] for n in tables], [b[n] for n in tables], "the factors")


def check_model_only(model: Any, clip: Any) -> None:
    """The model-only loader gives the UNet's LoRA, and says of the tokens that they are not loaded."""
    said.clear()
    alone = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "two.safetensors", 1.0)[0]
    whole, _ = load("two", model, clip)
    a, b = weights_of(alone), weights_of(whole)
    same([a[n] for n in a], [b[n] for n in a], "model only", 0.0)
    for encoder in ("clip_l", "clip_g", "clip_h"):
        table = names.table_name(encoder)
        told = any(f"lora key not loaded: {table}" in line for line in said)
        assert told == hasattr(clip.cond_stage_model, encoder), said


def check_half_precision(models: Any, concepts: Any, triggers: Any) -> None:
    """In a table of float16 the row is the vector rounded, by at most 2^-11 of each of its values."""
    clip = reduced.clip(family)
    clip.cond_stage_model.half()
    files.save_concepts(concepts, "half", True, True, clip)
    loaded = load("half", models.model, clip)[1]
    table = "{}.transformer.text_model.embeddings.token_embedding.weight"
    state = weights_of(loaded.patcher)
    for encoder in models.encoders:
        ids = part("nodes.host.text").vocabularies(clip, [encoder])[encoder].pieces("sks")
        row, v = state[table.format(encoder)][ids[0]].float(), concepts.vectors["rex"][encoder][0]
        assert ((row - v).abs() <= v.abs() * 2**-11 + 1e-7).all(), (row - v).abs().max()
    ours = application.apply_concepts(models.model, clip, concepts, 1.0)[1]
    a, b = encoded(ours, TEXTS[0])[0], encoded(loaded, stock_text(TEXTS[0], triggers))[0]
    share = float(torch.dist(a, b) / torch.dist(a, encoded(clip, TEXTS[0])[0]))
    sys.stdout.write(f"{family}: float16 table, encoded prompt off by {share:.1e} of the effect\n")
    assert share < 5e-3, share


logging.getLogger().addHandler(Listener())
with torch.inference_mode():
    for family in families:
        run()
        sys.stdout.write(f"{family} is fine\n")
