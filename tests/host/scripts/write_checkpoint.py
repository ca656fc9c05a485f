"""Write a checkpoint with random weights, as ComfyUI's own Save Checkpoint would name and lay them out.

`write_checkpoint.py FAMILY FILE [small]`: FAMILY is sd1 or sdxl, and FILE a new file of safetensors in fp16.
A small one has as little as Load Checkpoint still takes for the family: a UNet with the depth and the text
width that it knows the family by, and a TAESD for the autoencoder. The text encoders are whole in both, since
ComfyUI takes their sizes from the family and not from the file.
"""

import sys
from pathlib import Path
from typing import Any

arguments = sys.argv[1:]

import full_size  # noqa: E402
import torch  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

SMALL: dict[str, dict[str, Any]] = {
    "sd1": {"channel_mult": [1, 1, 1], "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1],
            "transformer_depth_output": [0, 0, 1, 1, 1, 1]},
    "sdxl": {"channel_mult": [1, 1, 1], "transformer_depth_middle": 1,
             "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1]},
}  # fmt: skip


def shapes(family: str, small: bool) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint by name, on the meta device."""
    unet = full_size.unet(family, **(SMALL[family] if small else {})).model
    with full_size.META:
        vae = TAESD() if small else full_size.Autoencoder().first_stage_model
    clip = full_size.clip(family).cond_stage_model
    names = unet.model_config
    return {
        **names.process_unet_state_dict_for_saving(unet.diffusion_model.state_dict()),
        **names.process_vae_state_dict_for_saving(vae.state_dict()),
        **names.process_clip_state_dict_for_saving(clip.state_dict()),
    }


def filled(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values that neither grow nor vanish from layer to layer, made where the generator is."""
    if "position_ids" in name:
        return torch.arange(like.numel()).reshape(like.shape)
    x = torch.randn(like.shape, generator=generator, device=generator.device)
    if like.ndim > 1:
        return (x / like[0].numel() ** 0.5).half().cpu()
    scale = like.ndim == 0 or ("norm" in name and name.endswith("weight"))
    return (1.0 * scale + 0.02 * x).half().cpu()


def write(family: str, file: Path | str, generator: torch.Generator, small: bool = False) -> None:
    """Write the checkpoint."""
    tensors = shapes(family, small).items()
    save_file({name: filled(name, like, generator) for name, like in tensors}, file)


if __name__ == "__main__":
    family, path, *small = arguments
    write(family, path, torch.Generator().manual_seed(0), bool(small))
