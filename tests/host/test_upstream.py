"""What other nodes do to MODEL and CLIP, before learning and before and after masks: as in sampling, or said."""

from pathlib import Path

from found import run_script

UPSTREAM = [
    "plain", "freeu", "guidance", "hypertile", "token_merging", "deep_shrink", "compiled", "skipping_steps",
    "something_else_runs", "adapters", "bypassed_adapters", "image_adapter", "one_time_in_a_batch",
    "kernel_without_gradient", "operator_without_backward", "loss_without_gradient", "clip_skip",
    "samplings", "learned_weights",
]  # fmt: skip
LAYOUT = [
    "written_out", "whole_picture", "once_per_size", "deep_shrink", "areas", "joined", "averaged", "combined",
    "encoded_by_other_nodes", "two_layouts", "no_part_of_a_key", "refusals",
]  # fmt: skip


def fine(said: str) -> list[str]:
    return [line.split()[0] for line in said.splitlines() if line.endswith(" is fine")]


def test_nodes_before_learning(comfyui: Path) -> None:
    """In one process, since starting ComfyUI takes longer than most of the checks."""
    assert fine(run_script(comfyui, "upstream.py")) == UPSTREAM


def test_masks_among_other_nodes(comfyui: Path) -> None:
    assert fine(run_script(comfyui, "layout.py")) == LAYOUT
