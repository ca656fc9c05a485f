"""How much CPU time the pack takes to load once ComfyUI is there, and what it drags in; a JSON line."""

import asyncio
import json
import sys
import time

from inside import import_pack, start_comfyui

start_comfyui()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402, F401
import folder_paths  # noqa: E402, F401
from comfy_api.latest import io  # noqa: E402, F401

HEAVY = ("matplotlib", "diffusers", "pydensecrf", "accelerate", "tqdm.notebook")
before = set(sys.modules)
started = time.process_time()
pack = import_pack()
extension = asyncio.run(pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
schemas = [node.GET_SCHEMA() for node in nodes]
seconds = time.process_time() - started
heavy = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in HEAVY)
sys.stdout.write(json.dumps({"seconds": seconds, "heavy": heavy, "nodes": len(schemas)}) + "\n")
