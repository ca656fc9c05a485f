"""What ComfyUI's own parser reads of this pack's pyproject.toml; a JSON line."""

import json
import os
import sys

from inside import ROOT

sys.path[:0] = [os.environ["COMFYUI_PATH"]]
from comfy_config.config_parser import extract_node_configuration  # noqa: E402

found = extract_node_configuration(str(ROOT))
sys.stdout.write(f"{found.model_dump_json()}\n" if found else json.dumps(None))
