"""A missing ComfyUI cannot be overlooked."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_last_line_says_that_host_tests_were_skipped_and_why(tmp_path: Path) -> None:
    environment = os.environ | {"COMFYUI_PATH": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/host/test_families.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("ComfyUI: 2 host tests were SKIPPED, 0 ran. No ComfyUI found")
    assert "COMFYUI_PATH" in last
