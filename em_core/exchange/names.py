"""The names of layers in LoRA files: kohya's, which ComfyUI, diffusers, A1111 and kohya itself read."""

import re

TEXT = re.compile(r"^(?:text_encoder(?:_2)?|clip_[lgh]\.transformer)\.(?:text_model\.)?(?=.)")
SECOND = ("clip_g.", "text_encoder_2.")
BLOCKS = re.compile(
    r"^diffusion_model\.(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.*)$"
)
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def kohya_name(path: str, sdxl: bool, blocks: int) -> str:
    """Return the name `lora_unet_...` or `lora_te_...` of a layer of either host.

    Args:
        path: the host's name of it.
        sdxl: whether the model is SDXL.
        blocks: residual blocks per level on the way down, see :func:`blocks_per_level`.
    """
    if TEXT.match(path):
        prefix = "lora_te" if not sdxl else "lora_te2" if path.startswith(SECOND) else "lora_te1"
        return f"{prefix}_text_model_{TEXT.sub('', path).replace('.', '_')}"
    if path.startswith("unet."):
        return f"lora_unet_{path.removeprefix('unet.').replace('.', '_')}"
    # kohya keeps the checkpoint's names for SDXL's UNet and uses diffusers' names for the others.
    name = path.removeprefix("diffusion_model.") if sdxl else diffusers_path(path, blocks)
    return f"lora_unet_{name.replace('.', '_')}"


def blocks_per_level(names: list[str]) -> int:
    """Return how many residual blocks a UNet has per level on the way down, by ComfyUI's names of its layers.

    With one block per level, input block 2 is the convolution that halves the size.
    """
    second = (".input_blocks.2.1.", ".input_blocks.2.0.in_layers.")
    return 2 if any(part in name for name in names for part in second) else 1


def diffusers_path(path: str, blocks: int) -> str:
    """Return diffusers' name of a layer in a block; other layers keep the checkpoint's.

    Args:
        path: ComfyUI's name of it.
        blocks: residual blocks per level on the way down.
    """
    found = BLOCKS.match(path)
    if found is None:
        return path.removeprefix("diffusion_model.")
    part, number, place, rest = found.groups()
    index = int(number)
    if part == "middle_block":
        kind = "attentions.0" if index == 1 else f"resnets.{index // 2}"
        return f"mid_block.{kind}.{layer_name(f'{place}.{rest}' if place else rest)}"
    if part == "input_blocks":
        if index == 0:
            return "conv_in"
        level, position = divmod(index - 1, blocks + 1)
        if position == blocks:
            return f"down_blocks.{level}.downsamplers.0.conv"
        return f"down_blocks.{level}.{in_block(place, position)}.{layer_name(rest)}"
    level, position = divmod(index, blocks + 1)
    if place != "0" and rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    return f"up_blocks.{level}.{in_block(place, position)}.{layer_name(rest)}"


def in_block(place: str, position: int) -> str:
    """Return which of a block's parts a layer lies in: a residual block, or the attention behind it."""
    return f"{'resnets' if place == '0' else 'attentions'}.{position}"


def layer_name(rest: str) -> str:
    """Return diffusers' name of a layer inside a part; those of attentions are the same."""
    return RESNET.get(rest, rest)


def difference_name(path: str) -> str:
    """Return the name `<layer>.diff` or `<layer>.diff_b`, as ComfyUI's own training writes it."""
    layer, _, kind = path.rpartition(".")
    end = ".diff_b" if kind == "bias" else ".diff"
    if layer.startswith("unet."):
        return f"lora_unet_{layer.removeprefix('unet.').replace('.', '_')}{end}"
    if layer.startswith("text_encoder"):
        encoder = "clip_g" if layer.startswith(SECOND) else "clip_l"
        return f"text_encoders.{encoder}.transformer.text_model.{TEXT.sub('', layer)}{end}"
    return (
        f"{layer}{end}" if layer.startswith("diffusion_model.") else f"text_encoders.{layer}{end}"
    )


def table_name(encoder: str) -> str:
    """Return ComfyUI's name, in LoRA files, of a text encoder's token table."""
    return f"text_encoders.{encoder}.transformer.text_model.embeddings.token_embedding"
