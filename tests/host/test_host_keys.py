"""Keys of runs, tried on ComfyUI's own patches and on stand-ins of other packs' ones; and Macs."""

from pathlib import Path

from found import run_script


def test_keys(comfyui: Path, tmp_path: Path) -> None:
    """In two processes, which give the same: a finished run is found again after a restart."""
    one, two = (run_script(comfyui, "keys.py", tmp_path).splitlines() for _ in range(2))
    assert one[-1] == "keys are right"
    assert one[-6:] == two[-6:] and len({line.rpartition(" ")[2] for line in one[-6:-1]}) == 5


def test_macs(comfyui: Path) -> None:
    assert run_script(comfyui, "macs.py").splitlines()[-1] == "no float64"
