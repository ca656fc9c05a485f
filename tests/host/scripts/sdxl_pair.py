"""What ComfyUI's host makes of a reduced SDXL: `sdxl_pair.py CASE.json LEARNED.safetensors OUT.safetensors`.

The case has prompts and numbers of vectors; LEARNED has weights as the diffusers host names them, a
LoRA and differences. OUT holds the weights, those of the UNet under diffusers'
names, the concepts' vectors, and what prompts and a prediction give.
"""

import json
import sys
from pathlib import Path

case, learned, out = map(Path, sys.argv[1:4])

import reduced  # noqa: E402
from inside import import_pack, part  # noqa: E402

import_pack()

import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def weights(model, clip) -> dict[str, torch.Tensor]:
    theirs = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    state = model.model.diffusion_model.state_dict()
    found = {f"unet/{name}": state[own].clone() for name, own in theirs.items() if own in state}
    assert len({theirs[name.removeprefix("unet/")] for name in found}) == len(state)
    for encoder in ("clip_l", "clip_g"):
        text = getattr(clip.cond_stage_model, encoder).transformer
        found |= {f"{encoder}/{name}": x.clone() for name, x in text.state_dict().items()}
    return found


def run() -> tuple[dict[str, torch.Tensor], dict]:
    given = json.loads(case.read_text())
    model, clip = reduced.unet("sdxl"), reduced.clip("sdxl")
    models = part("nodes.host.families").identify(model, clip, reduced.vae())
    host = part("nodes.host.comfy_host").ComfyHost(models)
    g = torch.Generator().manual_seed(0)
    vectors = {c: host.initial_vectors("", n, g) for c, n in given["vectors"].items()}
    parse = part("em_core.prompts").ConceptPrompt.parse
    found = weights(model, clip)
    found |= {f"vectors/{c}/{e}": v for c, of in vectors.items() for e, v in of.items()}
    said = []
    for number, text in enumerate(given["prompts"]):
        encoded = host.encode_prompts([parse(text)], vectors)
        stream = encoded.streams["text"]
        said.append([stream.columns[0], stream.end[0], stream.length])
        found |= {f"{number}/{name}": x for name, x in encoded.inputs.items()}
    Z, t = torch.randn(2, 4, 16, 12, generator=g), torch.tensor([100.0, 700.0])
    prompts = [parse(text) for text in given["prompts"][:2]]
    encoded = host.encode_prompts(prompts, vectors)
    found |= {"Z": Z, "t": t, "noise": host.predict(Z, t, encoded)}
    everything = load_file(learned)
    for kind in ("lora", "diff"):
        of_kind = {n: x for n, x in everything.items() if (".lora_" in n) == (kind == "lora")}
        with host.applied(of_kind, 0.5):
            found[kind] = host.predict(Z, t, host.encode_prompts(prompts, vectors))
    host.release()
    return found, {"said": said}


with torch.inference_mode():
    tensors, plain = run()
    tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
    save_file(tensors, out, metadata={"plain": json.dumps(plain)})
