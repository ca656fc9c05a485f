"""One short run on ComfyUI's host: `two_hosts.py CASE.safetensors MODEL_FOLDER OUT.safetensors`."""

import json
import sys
from pathlib import Path

from inside import import_pack, part, start_comfyui

case, model, out = map(Path, sys.argv[1:4])
start_comfyui()
import_pack()

import result as compare  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

with safe_open(case, framework="pt") as file:
    picture, plain = file.get_tensor("picture"), json.loads(file.metadata()["plain"])


def run() -> dict[str, torch.Tensor]:
    settings = part("em_core.settings")
    em = settings.from_json(settings.EMSettings, plain["em"])
    joint = settings.from_json(settings.JointSettings, plain["joint"])
    prompt = part("em_core.prompts").ConceptPrompt.parse(plain["prompt"])
    example = part("em_core.examples").Example(picture, prompt)
    model_, clip, vae = part("nodes.host.demo_model").load_demo_model(model)
    models = part("nodes.host.families").identify(model_, clip, vae)
    storage = torch.float8_e4m3fn if plain["fp8"] else None
    learning_host = part("nodes.host.comfy_host").learning_host
    with learning_host(models, torch.float32, None, storage) as host:
        problem = part("em_core.method.problem").prepare(host, [example], em, joint)
        state = part("em_core.method.start").initialise(problem)
        result = {"start": state.pictures[0].maps.clone(), "latent": problem.pictures[0].Z0}
        state = part("em_core.runs.runner").run(problem, state)
        return result | compare.result(state)


with torch.inference_mode():
    save_file(run(), out)
